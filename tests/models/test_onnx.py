"""A model in ONNX answers like the one it was made from, and can only be asked."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.errors import UsageError
from medspark.models.onnx import OnnxClassifier

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, np.ndarray]:
    weights = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("images", numbers, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", numbers, ["N", 3])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx", weights


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


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")

    with pytest.raises(UsageError, match="cannot be opened as an ONNX model"):
        OnnxClassifier(path)
