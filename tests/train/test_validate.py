"""Epochs are compared on the same images, by clean or robust balanced accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.data.config import DataConfig
from medspark.data.native import MappedSplit
from medspark.data.source import open_source
from medspark.evaluate.result import ConditionFigures
from medspark.train.result import ValidationResult
from medspark.train.validate import slices, validate
from medspark.train.world import World

WriteShards = Callable[..., Path]
CPU = torch.device("cpu")


def scores(clean: float | None, attacked: float | None) -> list[float]:
    """Return the scores of a plain and of a robust training by balanced accuracy."""
    figures = (
        ConditionFigures(accuracy=0.9, balanced_accuracy=balanced, auroc=0.5)
        for balanced in (clean, attacked)
    )
    clean_figures, pgd = figures
    return [
        ValidationResult.of(1, clean_figures, pgd, robust=robust).score for robust in (False, True)
    ]


def test_epochs_are_compared_by_balanced_accuracy_under_attack_where_that_is_trained_for() -> None:
    assert scores(0.8, 0.6) == [0.8, 0.6]
    assert scores(None, None) == [0, 0]


@pytest.mark.parametrize("robust", [True, False])
def test_auroc_decides_between_epochs_of_equal_score(robust: bool) -> None:
    def epoch(score: float, auroc: float | None) -> ValidationResult:
        judged = ConditionFigures(accuracy=0.5, balanced_accuracy=score, auroc=auroc)
        other = ConditionFigures(accuracy=0.5, balanced_accuracy=0.5, auroc=0.5)
        clean, pgd = (other, judged) if robust else (judged, other)
        return ValidationResult.of(1, clean, pgd, robust=robust)

    def better(new: ValidationResult, old: ValidationResult) -> bool:
        return new.better_than(old, robust=robust)

    assert better(epoch(0.5, 0.8), epoch(0.5, 0.6))
    assert not better(epoch(0.5, 0.6), epoch(0.5, 0.6))
    assert not better(epoch(0.5, 0.9), epoch(0.6, None))
    assert better(epoch(0.6, None), epoch(0.5, 0.9))


def test_a_validation_is_logged_by_condition_and_without_undefined_metrics() -> None:
    clean, pgd = ConditionFigures(accuracy=0.75, auroc=None), ConditionFigures(accuracy=0.5)

    assert ValidationResult.of(2, clean, pgd, robust=True).metrics() == {
        "val/epoch": 2, "val/score": 0, "val/clean/accuracy": 0.75, "val/pgd/accuracy": 0.5,
    }  # fmt: skip


class Rows(MappedSplit):
    """A split whose images tell their row."""

    def __init__(self) -> None:
        """Map no files."""

    def __len__(self) -> int:
        return 100

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(rows.astype(np.uint8)[:, None, None, None], (1, 2, 3, 1)), rows % 2


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 50))
def test_ranks_share_the_rows_out_and_none_stays_without(
    count: int, ranks: int, batch_size: int
) -> None:
    rows = 2 * np.arange(count)

    of_ranks = [
        list(slices(Rows(), rows, batch_size=batch_size, world=World(rank, 0, ranks, CPU)))
        for rank in range(ranks)
    ]

    seen = [torch.cat([numbers for _, _, numbers in batches]).tolist() for batches in of_ranks]
    assert all(seen)
    assert sorted({row for mine in seen for row in mine}) == rows.tolist()
    if count >= ranks:
        assert sum(map(len, seen)) == count
    for images, labels, numbers in (batch for batches in of_ranks for batch in batches):
        assert images.shape == (len(numbers), 1, 2, 3)
        assert len(numbers) <= batch_size
        torch.testing.assert_close(images[:, 0, 0, 0], numbers / 255)
        assert torch.equal(labels, numbers % 2)


_PASSES: list[Tensor] = []  # networks are copied before they are attacked


class Seen(nn.Module):
    """A network that records the grey level of the first pixel of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        _PASSES.append(images.detach())
        return images.flatten(1)[:, 5:6] * torch.tensor([1.0, -1.0]) + self.weight


def shown(split: MappedSplit, *, seed: int, images: int = 10, steps: int = 3, **threat) -> list:
    _PASSES.clear()
    validate(
        Seen().eval(), split, threat=ThreatModel(**threat), images=images, steps=steps, seed=seed,
        world=World(0, 0, 1, CPU),
    )  # fmt: skip
    return [passed for passed in _PASSES if len(passed) == min(images, len(split))]


def test_validation_looks_at_as_many_images_as_asked_always_the_same(
    write_shards: WriteShards,
) -> None:
    split = open_source(write_shards(rows=50), DataConfig()).split("val")

    first, again, other = (shown(split, seed=seed)[0] for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, shown(split, seed=1, images=50)[0][:10])


@pytest.mark.parametrize(("norm", "steps"), [("linf", 2), ("l2", 2), ("linf", 6)])
def test_validation_attacks_in_the_threat_model_that_is_trained_for(
    norm: str, steps: int, write_shards: WriteShards
) -> None:
    split = open_source(write_shards(rows=12), DataConfig()).split("val")

    clean, *attacked = shown(split, seed=0, steps=steps, norm=norm, eps=0.1)

    moved = [passed for passed in attacked if not torch.equal(passed, clean)]
    assert len(moved) == steps + 1  # its steps, and a look at the end
    change = (moved[-1] - clean).abs()
    assert (float(change.max()) > 0.11) == (norm == "l2")
