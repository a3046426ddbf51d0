"""Settings without a meaning together are refused in one sentence, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medspark.errors import UsageError
from medspark.train.combinations import check_combinations
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


class Nothing:
    def record(self, *_: Any) -> None:
        raise AssertionError("no step is taken")


def configured(**chosen: Any) -> FitConfig:
    return FitConfig.model_validate({"shards": "shards"} | chosen)


REFUSED = [
    ({"train": {"awp": 0.005, "mode": "standard"}}, "mode standard makes none"),
    (
        {"train": {"awp": 0.005}, "distill": {"teacher": "t", "method": "defensive"}},
        "method defensive makes none",
    ),
    ({"train": {"cutmix": 1.0}, "data": {"reader": "petastorm"}}, "cutmix needs data.reader nat"),
]


@pytest.mark.parametrize(("chosen", "sentence"), REFUSED, ids=str)
def test_what_has_no_meaning_is_refused(chosen: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        check_combinations(configured(**chosen), multi_label=False)


@pytest.mark.parametrize(
    "chosen",
    [
        {"train": {"awp": 0.005, "cutmix": 1.0, "mode": "ikl"}},
        {"train": {"awp": 0.005}, "distill": {"teacher": "t", "method": "rslad"}},
        {"train": {"cutmix": 1.0, "mode": "standard"}},
    ],
    ids=str,
)
def test_what_has_one_passes(chosen: dict[str, Any]):
    check_combinations(configured(**chosen), multi_label=False)


def test_ikl_is_for_classes():
    with pytest.raises(UsageError, match="findings: use trades"):
        check_combinations(configured(train={"mode": "ikl"}), multi_label=True)
    student = configured(train={"mode": "ikl"}, distill={"teacher": "t"})
    check_combinations(student, multi_label=True)


def test_a_training_refuses_before_its_first_step(
    write_shards: Callable[..., Path], tmp_path: Path
):
    shards = write_shards(rows=30, side=32, findings=2)
    config = configured(shards=shards, run_dir=tmp_path / "run", train={"mode": "ikl"})

    with pytest.raises(UsageError, match="findings: use trades"):
        fit(config, ALONE, Nothing())
    assert not (tmp_path / "run").exists()
