"""A run trains from shards to a chosen model, and resumes exactly after a crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medspark.errors import RunError, UsageError
from medspark.models.checkpoint import load_classifier
from medspark.train import engine as engines
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
WriteShards = Callable[..., Path]


class CrashError(Exception):
    """Simulates a lost machine."""


class Losses:
    """Keeps the loss of every step, and may end the process that reports one of them."""

    def __init__(self, *, crash_at: int = -1, crash_on: str = "loss") -> None:
        self.by_step: dict[int, float] = {}
        self._crash = crash_at, crash_on

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            self.by_step[step] = metrics["loss"]
        if step == self._crash[0] and self._crash[1] in metrics:
            raise CrashError


def configure(shards: Path, run_dir: Path, **train: Any) -> FitConfig:
    return FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": run_dir,
            "model": {"name": "test_efficientnet", "dropout": 0.2},
            "checkpoint": {"every_steps": 3, "keep": 1},
            "train": {"epochs": 2, "batch_size": 11, "precision": "fp32", "log_every": 2} | train,
            "evaluate": {"attacks": ["fgsm"], "sanity_images": 0},
        }
    )


def test_a_run_without_finite_gradients_ends_with_the_report_of_the_twentieth(
    write_shards: WriteShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines, "clip_gradients", lambda *_: torch.tensor(torch.nan))
    config = configure(write_shards(rows=44, side=32), tmp_path / "run", batch_size=2)
    losses = Losses()

    with pytest.raises(RunError, match="Training diverged"):
        fit(config, ALONE, losses)

    assert max(losses.by_step) == 20


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize(
    "train",
    [
        {},
        {"batch_norm": "frozen", "ema": 0.9},
        {"awp": 0.01, "awp_after": 0.0, "cutmix": 1.0},
        {"mode": "ikl", "inner_steps": 1},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one(
    train: dict[str, Any], device: torch.device, write_shards: WriteShards, tmp_path: Path
):
    world = World(0, 0, 1, device)
    shards = write_shards(rows=44, side=32)
    whole, broken, resumed = Losses(), Losses(crash_at=7), Losses()
    fit(configure(shards, tmp_path / "whole", **train), world, whole)
    with pytest.raises(CrashError):
        fit(configure(shards, tmp_path / "broken", **train), world, broken)

    fit(configure(shards, tmp_path / "broken", **train), world, resumed)

    assert min(resumed.by_step) == 7
    assert whole.by_step == broken.by_step | resumed.by_step
    (expected,) = (tmp_path / "whole/checkpoints").glob("step-*/state.safetensors")
    (found,) = (tmp_path / "broken/checkpoints").glob("step-*/state.safetensors")
    left, right = load_file(expected), load_file(found)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("at", [3, 6])
def test_an_epoch_whose_validation_was_interrupted_is_validated_when_the_run_goes_on(
    at: int, write_shards: WriteShards, tmp_path: Path
):
    shards = write_shards(rows=30, side=32)  # epochs of three steps, and a checkpoint every three
    whole = fit(configure(shards, tmp_path / "whole"), ALONE, Losses())
    with pytest.raises(CrashError):
        broken = configure(shards, tmp_path / "broken")
        fit(broken, ALONE, Losses(crash_at=at, crash_on="val/score"))

    resumed = fit(configure(shards, tmp_path / "broken"), ALONE, Losses())

    assert resumed["validation"] == whole["validation"]
    records = [
        json.loads(next((tmp_path / run / "checkpoints").glob("step-*/state.json")).read_text())
        for run in ("whole", "broken")
    ]
    assert len(records[0]["validations"]) == 2
    assert records[0]["validations"] == records[1]["validations"]


def test_the_result_says_what_was_done(
    device: torch.device, write_shards: WriteShards, tmp_path: Path
):
    config = configure(write_shards(rows=30, side=32), tmp_path / "run", epochs=1)

    result = fit(config, World(0, 0, 1, device), Losses())

    assert result["mode"] == "fused_noise"
    assert result["world_size"] == 1
    assert result["global_batch"] == 11
    assert result["steps"] == 3
    assert result["images_per_second"] > 0
    assert 0 <= result["data_wait_share"] < 1
    assert [attack["eps"] for attack in result["attacks"]] == [1 / 255, 2 / 255, 4 / 255]
    assert set(result["clean"]) >= {"accuracy", "balanced_accuracy", "auroc"}
    assert load_classifier(Path(result["model"])).channels == 1


def test_a_run_folder_of_another_configuration_is_refused(
    write_shards: WriteShards, tmp_path: Path
):
    shards = write_shards(rows=30, side=32)
    fit(configure(shards, tmp_path / "run", epochs=1), ALONE, Losses())

    with pytest.raises(UsageError, match="another configuration"):
        fit(configure(shards, tmp_path / "run", epochs=1, lr=0.5), ALONE, Losses())


def test_a_run_can_start_again_in_its_folder(write_shards: WriteShards, tmp_path: Path):
    shards = write_shards(rows=30, side=32)
    fit(configure(shards, tmp_path / "run", epochs=1), ALONE, Losses())
    config = configure(shards, tmp_path / "run", epochs=1, lr=0.5)
    losses = Losses()

    fit(config.model_copy(update={"resume": "never"}), ALONE, losses)

    assert min(losses.by_step) == 1


@pytest.mark.parametrize("method", ["kd", "defensive"])
def test_a_student_learns_from_a_trained_teacher(
    method: str, write_shards: WriteShards, tmp_path: Path
):
    shards = write_shards(rows=30, side=32)
    taught = fit(configure(shards, tmp_path / "teacher", epochs=1), ALONE, Losses())
    config = FitConfig.model_validate(
        configure(shards, tmp_path / "student", epochs=1).model_dump()
        | {"distill": {"teacher": taught["model"], "method": method}}
    )

    result = fit(config, ALONE, Losses())

    assert result["mode"] == method
    assert ("warning" in result) == (method == "defensive")


def test_a_teacher_of_other_classes_is_refused(write_shards: WriteShards, tmp_path: Path):
    shards = write_shards(rows=30, side=32)
    taught = fit(configure(shards, tmp_path / "teacher", epochs=1), ALONE, Losses())
    card = Path(taught["model"], "model.json")
    card.write_text(card.read_text().replace('"a"', '"c"'))
    config = FitConfig.model_validate(
        configure(shards, tmp_path / "student").model_dump()
        | {"distill": {"teacher": taught["model"]}}
    )

    with pytest.raises(UsageError, match="c, b"):
        fit(config, ALONE, Losses())


@pytest.mark.parametrize(("action", "steps"), [("warn", 6), ("noise", 6), ("restore", 3)])
def test_an_alarm_is_acted_on(action: str, steps: int, write_shards: WriteShards, tmp_path: Path):
    monitor = {"action": action, "gap": -1.0, "images": 8, "steps": 1}
    config = configure(write_shards(rows=30, side=32), tmp_path / "run", monitor=monitor)

    result = fit(config, ALONE, Losses())

    assert result["steps"] == steps
    assert {alarm["action"] for alarm in result["alarms"]} == {action}
    (state,) = (tmp_path / "run/checkpoints").glob("step-*/state.json")
    assert json.loads(state.read_text())["noise"] == (8.0 if action == "noise" else 2.0)


def test_batch_norm_settles_when_eps_has_risen(write_shards: WriteShards, tmp_path: Path):
    config = configure(write_shards(rows=30, side=32), tmp_path / "run", batch_norm="settle")

    result = fit(config, ALONE, Losses())

    assert result["batch_norm"] == "frozen"
