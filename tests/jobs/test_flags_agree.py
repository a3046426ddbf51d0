"""A training's own report and jobs/evaluate.py judge one network by one rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from array_shards import write_arrays

from medspark.evaluate.sanity import PROBE_STEPS, PROBED_IMAGES
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

# Flags about the attack that the two reports run with other numbers of steps.
OF_PGD = {"pgd_far_above_margin_pgd", "noise_as_strong_as_pgd", "pgd_not_falling_with_eps"}


class Silent:
    def record(self, step: int, metrics: object) -> None: ...


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Noise, with or without a faint ramp from left to right; more images than are probed."""

    def split(rows: int) -> tuple[Any, Any]:
        labels = np.arange(rows) % 2
        noise = np.random.default_rng(rows).normal(128, 20, (rows, 32, 32, 1))
        ramp = np.linspace(-25, 25, 32)[:, None] * labels[:, None, None, None]
        return np.clip(noise + ramp, 0, 255).astype(np.uint8), labels

    splits = {"train": split(256), "val": split(32), "test": split(300)}
    return write_arrays(tmp_path / "shards", splits, shards=2)


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "images"), [(3, None), (2, None), (3, 280)])
def test_two_reports_on_one_network_agree_flag_by_flag(
    spark,
    shards: Path,
    tmp_path: Path,
    load_job: Callable[[str], ModuleType],
    steps: int,
    images: int | None,
) -> None:
    config = FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": tmp_path / "run",
            "model": {"name": "test_resnet"},
            "train": {"epochs": 3, "batch_size": 16, "mode": "standard", "lr": 3e-3},
            "evaluate": {"eps": [4 / 255, 8 / 255], "steps": 3, "images": images},
        }
    )
    trained = fit(config, World(0, 0, 1, torch.device("cpu")), Silent())
    status = load_job("evaluate").main(
        [
            *("--model", str(tmp_path / "run" / "model"), "--shards", str(shards)),
            *("--attacks", "fgsm,pgd", "--eps", "4/255,8/255", "--steps", str(steps)),
            *("--piece", "100", "--bootstrap", "0", "--gallery", "0"),
            *(() if images is None else ("--images", str(images))),
            *("--folder", str(tmp_path / "work"), "--track.uri", f"sqlite:///{tmp_path / 'm.db'}"),
            *("--output", str(tmp_path / "evaluate.json")),
        ]
    )
    evaluated = json.loads((tmp_path / "evaluate.json").read_text())

    assert status == 0
    assert trained["images"] == evaluated["images"] == (images or 300)
    assert trained["clean"]["accuracy"] == evaluated["clean"]["accuracy"]
    ours, theirs = ({flag["name"]: flag for flag in r["flags"]} for r in (trained, evaluated))
    assert list(ours) == list(theirs)
    for name, flag in ours.items():
        if steps == config.evaluate.steps or name not in OF_PGD:
            measured = ("triggered", "images", "eps", "steps", "threshold")
            assert [flag[key] for key in measured] == [theirs[name][key] for key in measured]
            assert flag["value"] == pytest.approx(theirs[name]["value"], abs=1e-3)
    fgsm = ours["fgsm_far_above_margin_pgd"]
    assert (fgsm["images"], fgsm["steps"]) == (PROBED_IMAGES, PROBE_STEPS)
    assert fgsm["value"] > 0
    assert fgsm["sentence"].endswith("(measured on 256 images, eps 8/255, 20 steps)")
