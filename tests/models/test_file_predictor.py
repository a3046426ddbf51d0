"""Files in base64 in, calibrated probabilities out."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import columns_of
from medspark.models.checkpoint import calibrate, describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.file_predictor import FilePredictor
from medspark.models.predictor import Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model = build(ModelConfig(name="resnet10t"), num_classes=2, channels=1)
    save_classifier(
        place, model, describe(model, classes=("normal", "pneumonia"), height=32, width=32)
    )
    return place


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_png_of_the_training_size_is_answered_as_its_pixels_are(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)

    (answer,) = FilePredictor.load(folder)([_png(pixels)])

    expected = Predictor.load(folder)(pixels[None, :, :, None])[0]
    assert [answer["normal"], answer["pneumonia"]] == pytest.approx(list(expected), abs=1e-6)
    assert answer["label"] == ("normal", "pneumonia")[int(expected.argmax())]
    assert answer["probability"] == pytest.approx(float(expected.max()))


def test_a_dicom_file_of_any_size_is_answered(folder: Path) -> None:
    path = get_testdata_file("CT_small.dcm")
    text = base64.b64encode(Path(str(path)).read_bytes()).decode()

    (answer,) = FilePredictor.load(folder)([text])

    assert answer["normal"] + answer["pneumonia"] == pytest.approx(1)


def test_the_temperature_of_the_card_moves_the_probability_and_not_the_answer(folder: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    (before,) = FilePredictor.load(folder)([_png(pixels)])

    calibrate(folder, 4.0)
    (after,) = FilePredictor.load(folder)([_png(pixels)])
    calibrate(folder, 1.0)

    assert after["label"] == before["label"]
    assert 0.5 <= after["probability"] < before["probability"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not base64!", "image 0 is not base64"),
        (base64.b64encode(b"no image").decode(), "image 0 cannot be read: "),
    ],
)
def test_what_is_no_image_is_told_in_a_sentence(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        FilePredictor.load(folder)([text])


@pytest.mark.parametrize("multi_label", [True, False])
def test_classes_that_are_called_as_parts_of_an_answer_have_columns_of_their_own(
    tmp_path: Path, multi_label: bool
) -> None:
    classes = ("probability", "a", "label")
    model = build(ModelConfig(name="resnet10t"), num_classes=3, channels=1).eval()
    card = describe(model, classes=classes, multi_label=multi_label, height=32, width=32)
    save_classifier(tmp_path, model, card)
    pixels = np.zeros((32, 32), np.uint8)

    (answer,) = FilePredictor.load(tmp_path)([_png(pixels)])

    expected = Predictor.load(tmp_path)(pixels[None, :, :, None])[0]
    columns = ("class probability", "a", "class label")
    assert [answer[name] for name in columns] == pytest.approx(list(expected), abs=1e-6)
    assert answer["probability"] == pytest.approx(float(expected.max()))
    assert {*answer["label"].split("|")} <= {*classes, ""}


CLASSES = st.lists(
    st.sampled_from(["label", "probability", "error", "class label", "class class label", "x"]),
    unique=True,
)


@given(CLASSES)
def test_every_class_has_a_column_that_nothing_else_has(classes: list[str]) -> None:
    columns = columns_of(classes)

    assert len({*columns, "label", "probability", "error"}) == len(classes) + 3
    for name, column in zip(classes, columns, strict=True):
        assert column.endswith(name)
        assert column == name or name in ("label", "probability", "error")


def test_findings_are_answered_each_for_itself(tmp_path: Path) -> None:
    model = build(ModelConfig(name="resnet10t"), num_classes=3, channels=1).eval()
    card = describe(model, classes=("a", "b", "c"), multi_label=True, height=32, width=32)
    head = model.backbone.get_classifier()
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([2.0, -2.0, 4.0])
    save_classifier(tmp_path, model, card)
    calibrate(tmp_path, 2.0)

    (answer,) = FilePredictor.load(tmp_path)([_png(np.zeros((32, 32), np.uint8))])

    expected = torch.tensor([1.0, -1.0, 2.0]).sigmoid().tolist()
    assert [answer[name] for name in "abc"] == pytest.approx(expected)
    assert (answer["label"], answer["probability"]) == ("a|c", pytest.approx(expected[2]))
