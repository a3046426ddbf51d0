"""Every setting that decides the weights changes the digest of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medspark.train.config import FitConfig, TrainConfig

BASE: dict[str, Any] = {"shards": "shards", "distill": {"teacher": "t"}, "prune": {}}
OTHERS = (
    True, False, 0.25, 0.5, 1.0, 2, 3, "other", "l2", "kd", "ard", "standard", "main", "off",
    "frozen", "balanced", "lasso", "exact", "fp32", "petastorm", "size", "never",
)  # fmt: skip
# Folders, resuming and reports do not decide the weights.
FREE = ("shards", "run_dir", "evaluate", "decision", "checkpoint", "resume", "attempt")
FREE_OF_DATA = ("verify", "prefetch", "cache_dir")


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        here = (*path, key)
        found += leaves(value, here) if isinstance(value, dict) else [here]
    return found


def changed(path: tuple[str, ...]) -> FitConfig | None:
    """Return the configuration with another value at ``path``, the first that is valid."""
    config = FitConfig.model_validate(BASE)
    for other in OTHERS:
        values = config.model_dump()
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        if inner[path[-1]] == other:
            continue
        inner[path[-1]] = other
        try:
            return FitConfig.model_validate(values)
        except ValidationError:
            continue
    return None


PATHS = leaves(FitConfig.model_validate(BASE).model_dump())


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_what_decides_the_weights_changes_the_digest_and_nothing_else_does(
    path: tuple[str, ...],
) -> None:
    other = changed(path)
    if other is None:
        pytest.skip("no other value of this key is tried here")
    decides = path[0] not in FREE and not (path[0] == "data" and path[1] in FREE_OF_DATA)

    same = other.digest() == FitConfig.model_validate(BASE).digest()

    assert same != decides


def test_nearly_every_key_was_tried() -> None:
    assert sum(changed(path) is None for path in PATHS) <= 4


def test_training_on_attacks_or_not_is_read_off_the_mode_and_the_method() -> None:
    plain, attacked = TrainConfig(mode="standard"), TrainConfig(mode="trades")

    assert not FitConfig(shards=Path("s"), train=plain).attacks
    assert FitConfig(shards=Path("s"), train=attacked).attacks


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "2f5510e80a03aa1f4e47218929848fcbb4b1ff588445d75b93fce5d2da6a3c80"),
        (
            {"distill": {"teacher": "t"}, "data": {"share": 0.5}, "train": {"mode": "pgd"}},
            "45ff890996dd4689f04f1fa7438c77ed36447794b41e9d04f73a284c5e91f7dc",
        ),
    ],
)
def test_checkpoints_of_earlier_versions_are_recognised(settings: dict[str, Any], digest: str):
    """A new setting, or another default, would keep old runs from resuming."""
    assert FitConfig.model_validate({"shards": "s"} | settings).digest() == digest
