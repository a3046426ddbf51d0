"""A training of a number of steps in place of epochs: planned for it, not cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.schedule import one_cycle, ramp
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
PER_EPOCH = 4


class StopError(Exception):
    """Simulates a lost machine."""


class Steps:
    """Keeps the metrics of every step, and may end the process at one of them."""

    def __init__(self, stop_at: int = -1) -> None:
        self.found: dict[int, Mapping[str, float]] = {}
        self._stop_at = stop_at

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            self.found[step] = metrics
            if step == self._stop_at:
                raise StopError


@pytest.fixture
def configure(write_shards, tmp_path: Path):
    shards = write_shards(rows=24, side=32)

    def of(name: str, steps: int | None) -> FitConfig:
        return FitConfig.model_validate(
            {
                "shards": shards,
                "run_dir": tmp_path / name,
                "model": {"name": "test_efficientnet"},
                "steps": steps,
                "checkpoint": {"every_steps": 1, "keep": 1},
                "train": {"epochs": 3, "batch_size": 6, "precision": "fp32", "log_every": 1},
                "evaluate": {"attacks": (), "eps": (), "sanity_images": 0},
            }
        )

    return of


@pytest.mark.parametrize(("steps", "taken", "epochs"), [(6, 6, 2), (2, 2, 1), (None, 12, 3)])
def test_it_takes_so_many_steps_and_validates_the_part_of_an_epoch_too(
    configure, tmp_path: Path, steps: int | None, taken: int, epochs: int
) -> None:
    result = fit(configure("run", steps), ALONE, Steps())

    assert (result["steps"], result["epochs"]) == (taken, epochs)
    state = json.loads(next((tmp_path / "run/checkpoints").glob("step-*/state.json")).read_text())
    assert len(state["validations"]) == epochs


def test_learning_rate_and_eps_follow_their_schedules_over_the_steps(configure) -> None:
    kept, config = Steps(), configure("run", 6)

    fit(config, ALONE, kept)

    rates = [kept.found[step]["lr"] for step in range(1, 7)]
    budgets = [kept.found[step]["eps"] for step in range(1, 7)]
    train = config.train
    assert rates == pytest.approx(
        [one_cycle(k, 6, peak=train.lr, rising=train.lr_rise) for k in range(6)]
    )
    assert budgets == pytest.approx(
        [config.attack.eps * ramp(k, 6, share=train.eps_warmup) for k in range(6)]
    )


@pytest.mark.parametrize("stop_at", [3, 4, 5])
def test_a_resumed_run_ends_as_the_unbroken_one(configure, tmp_path: Path, stop_at: int) -> None:
    whole = fit(configure("whole", 6), ALONE, Steps())
    with pytest.raises(StopError):
        fit(configure("broken", 6), ALONE, Steps(stop_at))

    resumed = fit(configure("broken", 6), ALONE, Steps())

    assert resumed["validation"] == whole["validation"]
    weights = [load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_takes_no_step_and_is_not_validated_again(configure) -> None:
    first = fit(configure("run", 6), ALONE, Steps())
    again = Steps()

    result = fit(configure("run", 6), ALONE, again)

    assert again.found == {}
    assert result["validation"] == first["validation"]


def test_another_number_of_steps_is_another_training(configure) -> None:
    assert configure("a", 6).digest() == configure("b", 6).digest()
    assert len({configure("a", steps).digest() for steps in (None, 6, 7)}) == 3
