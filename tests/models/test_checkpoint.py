"""Models are restored exactly from disk, without unpickling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tensors import same_tensors

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import CARD, WEIGHTS, read_card
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.models.predictor import Predictor


@pytest.fixture
def model() -> Classifier:
    return build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()


@pytest.fixture
def folder(tmp_path: Path, model: Classifier) -> Path:
    card = describe(model, classes=("NORMAL", "PNEUMONIA"), height=32, width=32)
    save_classifier(tmp_path / "model", model, card)
    return tmp_path / "model"


def test_a_model_comes_back_bit_for_bit(folder: Path, model: Classifier) -> None:
    assert same_tensors(load_classifier(folder), model)


def test_a_network_for_one_size_of_images_comes_back_for_the_same_size(tmp_path: Path) -> None:
    model = build(ModelConfig(name="test_vit"), num_classes=2, channels=1, size=(32, 48))
    save_classifier(tmp_path, model, describe(model, classes=("A", "B"), height=32, width=48))

    assert same_tensors(load_classifier(tmp_path), model)


def test_the_card_tells_what_the_weights_are(folder: Path) -> None:
    card = read_card(folder)

    assert card.architecture == "test_resnet"
    assert card.classes == ("NORMAL", "PNEUMONIA")
    assert len(card.mean) == card.channels == 1


def test_a_folder_without_its_card_is_no_model(folder: Path) -> None:
    (folder / CARD).unlink()

    with pytest.raises(UsageError, match=r"no model\.json"):
        load_classifier(folder)


def test_a_card_of_an_unknown_version_is_refused(folder: Path) -> None:
    text = (folder / CARD).read_text().replace('"schema_version": 2', '"schema_version": 99')
    (folder / CARD).write_text(text)

    with pytest.raises(UsageError, match="schema_version"):
        load_classifier(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])

    with pytest.raises(UsageError, match=r"model\.safetensors' cannot be loaded"):
        load_classifier(folder)


@pytest.mark.parametrize("name", ["model.pt", "model.pt2", "model.pkl"])
def test_pickled_models_are_refused_unopened(name: str) -> None:
    with pytest.raises(UsageError, match="can run code"):
        load_classifier(Path(name))


def test_stored_pixels_and_unit_floats_get_the_same_answer(folder: Path) -> None:
    predict = Predictor.load(folder)
    stored = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)

    answer = predict(stored)

    np.testing.assert_allclose(answer.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(answer, predict(stored / np.float32(255)), rtol=1e-5)


def test_the_answer_does_not_depend_on_the_batch_size(model: Classifier, folder: Path) -> None:
    images = np.random.default_rng(0).random((5, 32, 32, 1), dtype=np.float32)
    whole, card = Predictor.load(folder)(images), read_card(folder)

    small = Predictor(model, card, batch_size=2)(images)

    np.testing.assert_allclose(small, whole, atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32), np.uint8),
        np.zeros((2, 1, 32, 32), np.uint8),
        np.zeros((2, 32, 32, 1), np.int64),
        np.full((2, 32, 32, 1), 255.0),
    ],
    ids=["no channel", "channels first", "signed", "floats above one"],
)
def test_images_of_another_form_are_refused(folder: Path, images: np.ndarray) -> None:
    with pytest.raises(UsageError, match="should"):
        Predictor.load(folder)(images)


def test_saving_again_replaces_the_model_whole(folder: Path, model: Classifier) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1)

    save_classifier(folder, model, read_card(folder))

    assert same_tensors(load_classifier(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CARD])
