"""Between epochs: which network is kept, what is recorded, when a checkpoint is due."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_shards import write_arrays

from medspark.data.source import Source
from medspark.errors import UsageError
from medspark.evaluate.calibrate import best_temperature
from medspark.evaluate.result import ConditionFigures
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.train import loop
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.monitor import Accuracies
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


class StopError(Exception):
    """Simulates a lost machine."""


class Kept:
    """Keeps what is recorded, and may end the process at a step."""

    def __init__(self, stop_at: int = -1) -> None:
        self.records: list[tuple[int, Mapping[str, float]]] = []
        self._stop_at = stop_at

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.records.append((step, metrics))
        if step == self._stop_at and "loss" in metrics:
            raise StopError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("epochs"))


def write(folder: Path, *, seed: int = 0, bits: int = 8) -> Path:
    largest = 2**bits
    images = (
        np.random.default_rng(seed).integers(0, largest, (12, 32, 32, 1)).astype(f"<u{bits // 8}")
    )
    splits = dict.fromkeys(("train", "val", "test"), (images, np.arange(12) % 2))
    return write_arrays(folder, splits, shards=1, rows_per_group=8)


def configure(shards: Path, run_dir: Path, **train: Any) -> FitConfig:
    return FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": run_dir,
            "model": {"name": "test_efficientnet", "dropout": 0.25},
            "checkpoint": {"every_steps": 1, "keep": 1},
            "train": {"epochs": 3, "batch_size": 6, "precision": "fp32", "log_every": 1} | train,
            "evaluate": {"attacks": ["fgsm"], "eps": ["2/255"], "sanity_images": 0},
        }
    )


def scored(monkeypatch: pytest.MonkeyPatch, *scores: tuple[float, float]) -> None:
    """Make validation return these balanced accuracies, clean and attacked, per epoch."""
    left = iter(scores)

    def found(*_: object, **__: object) -> tuple[ConditionFigures, ...]:
        return tuple(ConditionFigures(balanced_accuracy=score) for score in next(left))

    monkeypatch.setattr(loop, "validate", found)


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("fused", [(0.9, 0.5), (0.1, 0.8), (0.2, 0.7)], 2),
        ("standard", [(0.9, 0.5), (0.1, 0.8), (0.2, 0.7)], 1),
        ("fused", [(0.9, 0.5), (0.9, 0.5), (0.9, 0.4)], 1),
    ],
)
def test_the_best_epoch_is_kept_and_the_first_of_equal_ones(
    mode: str,
    scores: list,
    kept: int,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored(monkeypatch, *scores)

    result = fit(configure(shards, tmp_path, mode=mode), ALONE, Kept())

    assert result["validation"]["epoch"] == kept
    assert result["validation"]["score"] == scores[kept - 1][mode == "fused"]


def test_an_interrupted_run_remembers_what_it_had_noticed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = {"action": "noise", "gap": 0.5, "drop": 0.3}
    config = configure(shards, tmp_path, monitor=monitor)
    # A gap after the first epoch; after the third, a fall below the best, which was the second.
    accuracies = iter(
        [
            Accuracies(1, 0.9, 0.1),
            Accuracies(1, 0.9, 0.9),
            Accuracies(1, 0.5, 0.5),
        ]
    )
    monkeypatch.setattr(loop, "attack_watched", lambda *_, **__: next(accuracies))
    with pytest.raises(StopError):
        fit(config, ALONE, Kept(stop_at=5))
    scored_before = json.loads(next(tmp_path.glob("checkpoints/step-*/state.json")).read_text())

    result = fit(config, ALONE, Kept())

    assert [alarm["epoch"] for alarm in result["alarms"]] == [1, 3]
    assert [alarm["action"] for alarm in result["alarms"]] == ["noise", "noise"]
    assert (scored_before["noise"], scored_before["watched_best"]) == (4.0, 0.9)
    state = json.loads(next(tmp_path.glob("checkpoints/step-*/state.json")).read_text())
    assert (state["noise"], len(state["validations"])) == (8.0, 3)


def test_without_noise_an_alarm_begins_with_one_eps_of_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "attack_watched", lambda *_, **__: Accuracies(1, 0.9, 0.1))
    chosen = {"monitor": {"action": "noise"}, "noise": 0.0, "epochs": 1}

    fit(configure(shards, tmp_path, **chosen), ALONE, Kept())

    state = json.loads(next(tmp_path.glob("checkpoints/step-*/state.json")).read_text())
    assert state["noise"] == 1.0


@pytest.mark.parametrize(("mode", "action"), [("standard", "warn"), ("fused", "off")])
def test_nothing_is_watched_where_nothing_is_attacked_or_nobody_wants_it(
    mode: str, action: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "attack_watched", lambda *_, **__: pytest.fail("was watched"))
    chosen = {"mode": mode, "monitor": {"action": action}, "epochs": 1}

    assert fit(configure(shards, tmp_path, **chosen), ALONE, Kept())["alarms"] == []


def test_a_run_folder_of_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    fit(configure(shards, tmp_path / "run", epochs=1), ALONE, Kept())
    other = write(tmp_path / "other", seed=1)

    with pytest.raises(UsageError, match="holds a run with other data"):
        fit(configure(other, tmp_path / "run", epochs=1), ALONE, Kept())


def test_the_kept_model_says_what_it_was_trained_on_and_is_as_sure_as_validation_allows(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "deep", bits=16)

    result = fit(configure(folder, tmp_path / "run", epochs=1), ALONE, Kept())

    card = read_card(Path(result["model"]))
    assert (card.bits, card.dropout, card.classes) == (16, 0.25, ("a", "b"))
    images = np.random.default_rng(0).integers(0, 2**16, (12, 32, 32, 1)).astype("<u2")
    model = load_classifier(Path(result["model"]))
    with torch.no_grad():
        pixels = torch.from_numpy(images.astype(np.float32) / 65535).permute(0, 3, 1, 2)
        logits = model(pixels)
    assert card.temperature == pytest.approx(
        best_temperature(logits, torch.arange(12) % 2), rel=0.02
    )


def test_a_resumed_run_begins_with_the_epoch_that_it_was_in(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    training = Source.training

    def watched(self: Source, **chosen: Any) -> Any:
        reader = training(self, **chosen)
        batches = reader.batches

        def deliver(epoch: int, *, start: int = 0) -> Any:
            read.append((epoch, start))
            return batches(epoch, start=start)

        reader.batches = deliver  # type: ignore[method-assign]
        return reader

    monkeypatch.setattr(Source, "training", watched)
    with pytest.raises(StopError):
        fit(configure(shards, tmp_path), ALONE, Kept(stop_at=4))
    read.clear()

    fit(configure(shards, tmp_path), ALONE, Kept())

    assert read == [(1, 1), (2, 0)]
