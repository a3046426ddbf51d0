"""Models that travel: read once, the same answers everywhere, and no torch for exported ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from networks import SIDE, images

from medspark.errors import UsageError
from medspark.models.card import CARD
from medspark.models.predictor import Predictor
from medspark.workflows.shipped_model import ModelFiles, ShippedModel

STORED = [(255 * image[0]).numpy().astype(np.uint8) for image in images(5)]


def shipped(folder: Path) -> ShippedModel:
    files = ModelFiles.read(folder)
    return ShippedModel(files.card, files.digest, SimpleNamespace(value=files.files), 1)


def test_a_model_answers_as_its_predictor_with_all_probabilities_by_class(model):
    answers = shipped(model)(STORED)

    wanted = Predictor.load(model)(np.stack(STORED)[..., None])
    found = np.array([[value for _, value in answer["probabilities"]] for answer in answers])
    assert np.array_equal(found.astype("f4"), wanted)
    assert [name for name, _ in answers[0]["probabilities"]] == ["a", "b"]
    assert [answer["label"] for answer in answers] == ["ab"[k] for k in wanted.argmax(1)]


@pytest.mark.parametrize("change", ["weights", "temperature"])
def test_a_model_that_changed_has_another_digest(model, tmp_path, change):
    before, copy = ModelFiles.read(model), tmp_path / "model"
    copy.mkdir()
    for name, content in before.files.items():
        (copy / name).write_bytes(content)
    assert ModelFiles.read(copy).digest == before.digest
    if change == "weights":
        (copy / "model.safetensors").write_bytes(before.files["model.safetensors"] + b" ")
    else:
        card = json.loads(before.files[CARD]) | {"temperature": 1.25}
        (copy / CARD).write_text(json.dumps(card))

    assert ModelFiles.read(copy).digest != before.digest


def test_a_model_that_cannot_be_opened_is_refused_on_the_driver(model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for name, content in ModelFiles.read(model).files.items():
        (copy / name).write_bytes(content[:1000])

    with pytest.raises(UsageError):
        ModelFiles.read(copy).check()


_ANSWER = """
import pickle, sys
sys.modules["torch"] = sys.modules["timm"] = None
from types import SimpleNamespace
from medspark.workflows.shipped_model import ModelFiles, ShippedModel
from pathlib import Path
files = ModelFiles.read(Path(sys.argv[1]))
model = ShippedModel(files.card, files.digest, SimpleNamespace(value=files.files), 1)
print(model(pickle.loads(sys.stdin.buffer.read())))
"""


def test_an_exported_model_answers_where_there_is_no_torch(model, tmp_path):
    pytest.importorskip("onnxruntime", reason="exports need onnxruntime")
    from test_runtime import export

    folder = export(tmp_path / "exported", model)

    done = subprocess.run(
        [sys.executable, "-c", _ANSWER, str(folder)],
        input=pickle.dumps(STORED), capture_output=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr.decode()[-1000:]
    wanted = shipped(model)(STORED)
    found = eval(done.stdout)
    assert [answer["label"] for answer in found] == [answer["label"] for answer in wanted]
    assert [a["probability"] for a in found] == pytest.approx(
        [a["probability"] for a in wanted], abs=1e-4
    )


def test_the_card_says_how_files_are_rendered(model):
    from medspark.models.prediction import rendering_of

    rendering = rendering_of(ModelFiles.read(model).card)

    assert (rendering.size, rendering.colour, rendering.frames) == (SIDE, "grey", "middle")
