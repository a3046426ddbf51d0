"""An exported model's folder: opened only whole and unchanged, and opening it runs no code."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images

from medspark.errors import UsageError
from medspark.export.artifact import write_artifact
from medspark.export.backends import float_graph
from medspark.export.judge import Judge, in_batches
from medspark.export.onnx import TOLERANCE, export_onnx
from medspark.export.packages import Backend
from medspark.export.runtime import DeployedModel
from medspark.models.card import CARD, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.predictor import Predictor

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def export(folder: Path, model: Path, *, backend: Backend = "onnxruntime") -> Path:
    """Export the network in ``model`` to ``folder`` in float, and return it."""
    content = export_onnx(load_classifier(model), height=32, width=32)
    graph = float_graph(backend, content)
    batch = images(8).numpy()
    judge = Judge.of(batch, np.arange(8) % 2, graph.run)
    card = read_card(model).model_copy(update={"temperature": 1.5})
    write_artifact(
        folder, graph, card, backend=backend, precision="fp32", twin="0" * 64, judge=judge
    )
    return folder


@pytest.fixture
def exported(tmp_path: Path, model: Path) -> Path:
    return export(tmp_path / "exported", model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_folder_predicts_as_the_torch_network(backend, threads: int, model, tmp_path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    folder = export(tmp_path / "exported", model, backend=backend)
    stored = (255 * images(5)).numpy().astype(np.uint8).transpose(0, 2, 3, 1)

    deployed = DeployedModel.load(folder, threads=threads)

    card = deployed.card.model_copy(update={"kind": "classifier", "exported": None})
    wanted = Predictor(load_classifier(model), card)(stored)
    assert np.abs(deployed(stored) - wanted).max() <= TOLERANCE
    assert deployed.card.temperature == 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_images_and_batches_of_any_size_get_the_same_answers(backend, model, tmp_path):
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    deployed = DeployedModel.load(export(tmp_path / "exported", model, backend=backend))
    batch = images(5).numpy()

    parts = [deployed.logits(part) for part in np.split(batch, [1, 4])]

    np.testing.assert_allclose(np.concatenate(parts), deployed.logits(batch), atol=1e-5)


@given(place=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_a_graph_with_any_bit_changed_is_refused(place: int, bit: int, shared_export: Path) -> None:
    file = shared_export / "model.onnx"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[place % len(whole)] ^= 1 << bit
    file.write_bytes(changed)
    try:
        with pytest.raises(UsageError, match="SHA-256 differs"):
            DeployedModel.load(shared_export)
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def shared_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from networks import network

    from medspark.models.checkpoint import describe, save_classifier

    home, made = tmp_path_factory.mktemp("export"), network()
    save_classifier(home / "model", made, describe(made, classes=("a", "b"), height=32, width=32))
    return export(home / "exported", home / "model")


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opening_a_folder_runs_no_code_from_it(backend, model, tmp_path: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    folder = export(tmp_path / "exported", model, backend=backend)
    trap = pickle.dumps(_Trap(tmp_path / "ran"))
    for file in folder.glob("model.[!j]*"):
        file.write_bytes(trap)
    _rewrite(folder, {name: hashlib.sha256(trap).hexdigest() for name in _files(folder)})

    with pytest.raises(UsageError, match="cannot be opened as an O"):
        DeployedModel.load(folder)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "model.py"])
def test_a_card_names_no_file_but_the_graphs(exported: Path, name: str) -> None:
    _rewrite(exported, {name: "0" * 64})

    with pytest.raises(UsageError, match="is not valid"):
        DeployedModel.load(exported)


def test_a_missing_graph_is_one_sentence(exported: Path) -> None:
    (exported / "model.onnx").unlink()

    with pytest.raises(UsageError, match=r"its model.onnx is missing or no file\.$"):
        DeployedModel.load(exported)


def test_networks_and_exports_are_not_mistaken_for_each_other(exported: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="kind onnx; this takes one of kind classifier"):
        load_classifier(exported)
    with pytest.raises(UsageError, match="kind classifier; this takes one of kind onnx or openv"):
        DeployedModel.load(model)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_another_size_are_one_sentence(backend, count, model, tmp_path: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    exported = export(tmp_path / "exported", model, backend=backend)
    with pytest.raises(UsageError, match="does not take images"):
        DeployedModel.load(exported).logits(np.zeros((count, 3, 32, 32), np.float32))


def test_an_int8_export_has_a_temperature_of_its_own(model: Path, tmp_path: Path) -> None:
    content = export_onnx(load_classifier(model), height=32, width=32)
    graph = float_graph("onnxruntime", content)
    batch = images(8).numpy()
    sure = in_batches(graph.run, batch).argmax(1)
    judge = Judge.of(batch, sure, graph.run)

    card = write_artifact(
        tmp_path / "x", graph, read_card(model), backend="onnxruntime", precision="int8",
        twin="0" * 64, judge=judge,
    )  # fmt: skip

    assert card.temperature < 1  # it is always right, and should be sure
    assert torch.equal(
        torch.tensor(DeployedModel.load(tmp_path / "x").card.temperature),
        torch.tensor(card.temperature),
    )


def _files(folder: Path) -> list[str]:
    return list(json.loads((folder / CARD).read_text())["exported"]["files"])


def _rewrite(folder: Path, files: dict[str, str]) -> None:
    """Let the card in ``folder`` name these files, with their hashes."""
    card = json.loads((folder / CARD).read_text())
    card["exported"]["files"] = files
    (folder / CARD).write_text(json.dumps(card))
