"""Files in base64 in, calibrated probabilities out."""

from __future__ import annotations

import base64
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from medspark.errors import UsageError
from medspark.images.pool import Turns
from medspark.models.backbones import build
from medspark.models.card import columns_of
from medspark.models.checkpoint import calibrate, describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.file_predictor import SERVING, FilePredictor, serving_limits
from medspark.models.predictor import Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model = build(ModelConfig(name="resnet10t"), num_classes=2, channels=1)
    save_classifier(
        place, model, describe(model, classes=("normal", "pneumonia"), height=32, width=32)
    )
    return place


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Iterator[FilePredictor]:
    loaded = FilePredictor.load(folder)
    yield loaded
    loaded.close()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


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


def test_lines_of_base64_may_be_broken(folder: Path) -> None:
    content = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
    whole, broken = base64.b64encode(content).decode(), base64.encodebytes(content).decode()

    first, *others = FilePredictor.load(folder)([whole, broken, broken.replace("\n", "\r\n")])

    assert others == [first, first]


def test_the_temperature_of_the_card_moves_the_probability_and_not_the_answer(folder: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    (before,) = FilePredictor.load(folder)([_png(pixels)])

    calibrate(folder, 4.0)
    (after,) = FilePredictor.load(folder)([_png(pixels)])
    calibrate(folder, 1.0)

    assert after["label"] == before["label"]
    assert 0.5 <= after["probability"] < before["probability"]


GOOD = st.integers(0, 255).map(lambda grey: _png(np.full((32, 32), grey, np.uint8)))
BAD = st.sampled_from(["not base64!", "", _text(b"no image"), _text(b"\x89PNG\r\n\x1a\n"), None])


@settings(max_examples=20)
@given(files=st.lists(st.one_of(GOOD, BAD), max_size=12))
def test_each_file_is_answered_in_its_row_whatever_stands_beside_it(
    predictor: FilePredictor, files: list[str]
) -> None:
    answers = predictor(files)

    assert len(answers) == len(files)
    for file, answer in zip(files, answers, strict=True):
        (alone,) = predictor([file])
        assert answer.keys() == alone.keys()
        if "error" in answer:
            assert answer == alone
            assert list(answer) == ["error"]
        else:
            assert answer["normal"] == pytest.approx(alone["normal"], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not base64!", "The image is not base64."),
        (_text(b"no image"), "The image cannot be read: the content is neither DICOM nor"),
        ("", "The image cannot be read: the file has no bytes."),
        (_text(bytes(100)), "The image cannot be read: 100 bytes, limit 99."),
    ],
)
def test_what_cannot_be_answered_is_told_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.setenv("MEDSPARK_SERVE_FILE_BYTES", "99")
    (answer,) = FilePredictor.load(folder)([text])

    assert answer["error"].startswith(sentence)
    assert answer["error"].count(". ") == 0


def test_of_several_frames_the_middle_one_is_answered(predictor: FilePredictor) -> None:
    data = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    frames = np.random.default_rng(0).integers(-1000, 1000, (5, 128, 128), dtype=np.int16)

    def saved(pixels: np.ndarray) -> str:
        data.NumberOfFrames, data.PixelData = len(pixels), pixels.tobytes()
        file = io.BytesIO()
        data.save_as(file)
        return _text(file.getvalue())

    whole, *single = predictor([saved(frames), *[saved(frames[n : n + 1]) for n in range(5)]])

    assert whole == pytest.approx(single[2], abs=1e-6)
    assert all(whole["normal"] != pytest.approx(single[n]["normal"], abs=1e-7) for n in (0, 4))


def test_a_file_that_ends_its_decoder_has_an_error_and_the_next_an_answer(folder: Path) -> None:
    predictor = FilePredictor.load(folder)
    good = _text(Path(str(get_testdata_file("JPEG2000.dcm"))).read_bytes())
    predictor([good])
    for decoder in predictor._pool._idle:
        if decoder._child is not None:
            os.kill(decoder._child._process.pid, signal.SIGKILL)

    first, second = predictor([good, good])

    assert first == {
        "error": "The image cannot be read: the decoder process crashed or exceeded its memory "
        "limit."
    }
    assert second["label"] in ("normal", "pneumonia")


def test_a_caller_whose_turn_does_not_come_is_told_so_for_every_file(folder: Path) -> None:
    turns = Turns(processes=1, wait_seconds=0.1, turn_seconds=1000)
    predictor = FilePredictor(Predictor.load(folder), turns=turns)

    with predictor._pool.turn():
        answers = predictor(["", ""])

    assert answers == [
        {"error": "The server has no time left for this image: send it again, later or with "
         "fewer others."}
    ] * 2  # fmt: skip


def test_the_environment_sets_each_limit_of_a_served_model() -> None:
    limits, turns = serving_limits({"MEDSPARK_SERVE_FILE_SECONDS": "2.5", "PATH": "/bin"})
    assert limits == SERVING.model_copy(update={"file_seconds": 2.5})
    assert turns == Turns()

    limits, turns = serving_limits({"MEDSPARK_SERVE_PROCESSES": "7"})
    assert (limits, turns.processes) == (SERVING, 7)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MEDSPARK_SERVE_FILE_SECOND", "2", "MEDSPARK_SERVE_FILE_SECOND is no setting"),
        ("MEDSPARK_SERVE_PROCESSES", "0", "MEDSPARK_SERVE_PROCESSES is not valid: .*equal to 1"),
        ("MEDSPARK_SERVE_FRAMES", "many", "MEDSPARK_SERVE_FRAMES is not valid: .*integer"),
    ],
)
def test_a_setting_that_is_unknown_or_not_valid_is_named(
    name: str, value: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        serving_limits({name: value})


def test_the_memory_of_all_decoders_is_below_the_promised_growth() -> None:
    assert Turns().processes * SERVING.memory_bytes < 1.25e9


@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_of_any_depth_is_asked_in_its_own_depth(tmp_path: Path, bits: int) -> None:
    model = build(ModelConfig(name="resnet10t"), num_classes=2, channels=1)
    card = describe(model, classes=("a", "b"), height=32, width=32, bits=bits)
    save_classifier(tmp_path, model, card)
    stored = np.random.default_rng(0).integers(0, 2**bits, (1, 32, 32, 1), dtype=f"u{bits // 8}")
    predictor = Predictor.load(tmp_path)

    (answer,) = FilePredictor.load(tmp_path)([_png(stored[0, :, :, 0])])

    expected = predictor(stored / (2**bits - 1))[0]
    assert predictor(stored)[0] == pytest.approx(expected, abs=1e-5)
    assert [answer["a"], answer["b"]] == pytest.approx(list(expected), abs=2e-3)


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
