"""A model in ONNX gives the logits of its source, and no gradients."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.models.onnx import OnnxClassifier
from medspark.shards.manifest import read_manifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


FLOAT, LONG = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
LINEAR = (("Flatten", "images", "flat"), ("MatMul", "flat weights", "logits"))


def _export(
    path: Path,
    *,
    nodes: tuple[tuple[str, str, str], ...] = LINEAR,
    inputs: bool = True,
    kind: int = FLOAT,
    classes: int = 3,
    opset: int = 17,
) -> np.ndarray:
    """Write a linear model of images 4 x 4, or what the changes make of it; return its weights."""
    helper = onnx.helper
    weights = np.random.default_rng(0).standard_normal((16, classes)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(name, taken.split(), [given]) for name, taken, given in nodes],
        "classifier",
        [helper.make_tensor_value_info("images", kind, ["N", 1, 4, 4])] if inputs else [],
        [helper.make_tensor_value_info("logits", kind, None)],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return weights


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, np.ndarray]:
    return tmp_path / "model.onnx", _export(tmp_path / "model.onnx")


def test_the_answers_are_those_of_the_file(exported: tuple[Path, np.ndarray]) -> None:
    path, weights = exported
    images = torch.rand(5, 1, 4, 4)

    logits = OnnxClassifier(path)(images)

    torch.testing.assert_close(logits, images.flatten(1) @ torch.from_numpy(weights))


@pytest.mark.parametrize("device", ["pretended", "cuda"], indirect=True)
def test_the_answers_are_where_the_images_are(exported, device: torch.device) -> None:
    assert OnnxClassifier(exported[0])(torch.rand(5, 1, 4, 4, device=device)).device == device


def test_it_gives_no_gradient(exported: tuple[Path, np.ndarray]) -> None:
    model = OnnxClassifier(exported[0])

    assert not model.gradients
    assert not model(torch.rand(1, 1, 4, 4).requires_grad_()).requires_grad


EMPTY = onnx.ModelProto().SerializeToString()


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100), EMPTY, b"\x08\x08" * 50])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    with pytest.raises(UsageError, match="cannot be opened as an ONNX model"):
        OnnxClassifier(path)


@given(st.data())
@settings(max_examples=30)
def test_a_damaged_file_answers_or_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        _export(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
        try:
            OnnxClassifier(path)(torch.rand(2, 1, 4, 4))
        except UsageError as refusal:
            assert len(str(refusal).splitlines()) == 1  # noqa: PT017 - some damage does no harm


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": (("Nope", "images", "logits"),)},
        {"nodes": (("Relu", "nowhere", "logits"),)},
        {"opset": 999},
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _export(tmp_path / "x.onnx", **change)

    with pytest.raises(UsageError, match="cannot be opened as an ONNX model"):
        OnnxClassifier(tmp_path / "x.onnx")


def test_a_model_without_an_input_is_refused(tmp_path: Path) -> None:
    _export(tmp_path / "x.onnx", nodes=(("Identity", "weights", "logits"),), inputs=False)

    with pytest.raises(UsageError, match="without an input"):
        OnnxClassifier(tmp_path / "x.onnx")


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 3, 4, 4), (1, 4, 4)])
def test_images_that_it_does_not_take_are_misuse(exported, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="does not take images"):
        OnnxClassifier(exported[0])(torch.rand(shape))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"classes": 2}, "its output is (1, 2) torch.float32, but should be (1, 3)"),
        ({"kind": LONG, "nodes": (("Flatten", "images", "logits"),)}, "does not take images"),
        ({"nodes": (("Identity", "images", "logits"),)}, "its output is (1, 1, 4, 4)"),
    ],
)
def test_a_model_of_other_images_or_classes_is_a_misfit(
    tmp_path: Path, write_shards, change: dict[str, Any], why: str
) -> None:
    _export(tmp_path / "x.onnx", **change)
    manifest = read_manifest(write_shards(rows=4, shards=1, side=4))
    manifest = manifest.model_copy(update={"classes": ("a", "b", "c")})

    found = OnnxClassifier(tmp_path / "x.onnx").misfit(manifest)

    assert why in found
    assert bool(why) == bool(found)
