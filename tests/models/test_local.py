"""Models at addresses: copied once, and anew when they change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medspark import storage
from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import read_card
from medspark.models.checkpoint import calibrate, describe, load_classifier, save_classifier
from medspark.models.config import ModelConfig, check_weights, model_folder
from medspark.models.local import local_model
from medspark.remote import any_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    card = describe(network, classes=("a", "b"), height=32, width=32)
    save_classifier(tmp_path / "model", network, card)
    return tmp_path / "model"


def upload(folder: Path, url: str) -> Path:
    for path in folder.iterdir():
        system, place = storage.filesystem(f"{url}/{path.name}")
        system.put_file(str(path), place)
    return any_path(url)


def test_a_local_model_is_read_where_it_lies(folder: Path) -> None:
    assert local_model(folder) is folder


def test_a_model_at_an_address_is_opened_like_any_other(folder: Path, bucket: str) -> None:
    place = upload(folder, f"{bucket}/deep/model")
    images = torch.rand(2, 1, 32, 32)

    assert read_card(place) == read_card(folder)
    with torch.no_grad():
        assert torch.equal(load_classifier(place)(images), load_classifier(folder)(images))


def test_a_model_is_copied_once_and_anew_when_it_changes(folder: Path, bucket: str) -> None:
    place = upload(folder, f"{bucket}/model")
    first = local_model(place)
    stamp = (first / "model.json").stat().st_mtime_ns

    assert local_model(place) == first
    assert (first / "model.json").stat().st_mtime_ns == stamp
    calibrate(folder, 2.0)
    upload(folder, f"{bucket}/model")

    assert read_card(place).temperature == 2.0
    assert read_card(first).temperature == 1.0


def test_a_single_file_is_copied_too(folder: Path, bucket: str) -> None:
    place = upload(folder, f"{bucket}/model") / "model.json"

    copy = local_model(place)

    assert copy.name == "model.json"
    assert copy.read_bytes() == (folder / "model.json").read_bytes()


def test_no_model_at_an_address_is_one_sentence(bucket: str) -> None:
    with pytest.raises(UsageError, match=f"^There is no model at {bucket}/none.$"):
        read_card(any_path(f"{bucket}/none"))


def test_first_weights_may_be_a_model_at_an_address(folder: Path, bucket: str) -> None:
    place = upload(folder, f"{bucket}/model")
    config = ModelConfig(name="test_resnet", weights=str(place))

    check_weights(config)

    assert model_folder(config) == place
