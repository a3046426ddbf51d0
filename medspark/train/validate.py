"""Evaluate the network on validation images, clean and under PGD; each rank takes a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Integers
from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.metrics import Metrics
from medspark.evaluate.robust import Array, evaluate
from medspark.seeding import derive
from medspark.shards.plan import permute, share
from medspark.train.world import World

__all__ = ["Validation", "gatherer", "slices", "validate"]


@dataclass(frozen=True)
class Validation:
    """Metrics on the validation images, clean and under PGD."""

    clean: Metrics
    attacked: Metrics

    def score(self, *, robust: bool) -> float:
        """Return the score that selects the best epoch: balanced accuracy, under PGD if ``robust``.

        Plain accuracy under attack would prefer a network that always predicts the larger class.
        AUROC would not notice that a half-trained network assigns nearly everything to one class.
        """
        figure = (self.attacked if robust else self.clean).balanced_accuracy
        return figure if figure is not None else 0.0


def validate(
    model: nn.Module,
    split: MappedSplit,
    *,
    threat: ThreatModel,
    images: int,
    steps: int,
    seed: int,
    world: World,
) -> Validation:
    """Return the metrics of ``model`` on at most ``images`` images, the same ones in every call."""
    count = min(images, len(split))
    rows = np.sort(permute(np.arange(count), len(split), derive(seed, "validation")))
    config = AttackSettings(
        attacks=("pgd",), norm=threat.norm, eps=(threat.eps,), steps=steps, sanity_images=0
    )
    batches = slices(split, rows, batch_size=config.batch_size, world=world)
    report = evaluate(model, batches, config, gather=gatherer(world))
    return Validation(report.clean, report.attacks[0].metrics)


def slices(
    split: MappedSplit, rows: Integers, *, batch_size: int, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's share of ``rows`` as images in [0, 1], labels and row numbers."""
    first, last = share(len(rows), world.size, world.rank)
    # A rank without a share repeats a row, because every rank must take part in gathering.
    mine = rows[first:last] if last > first else rows[:1]
    for begin in range(0, len(mine), batch_size):
        chosen = mine[begin : begin + batch_size]
        images, labels = split.tensors(chosen, world.device)
        yield images, labels, torch.from_numpy(chosen)


def gatherer(world: World) -> Callable[[Array], Array]:
    """Return a function that concatenates the arrays of all ranks along their first axis."""
    return lambda values: np.concatenate(world.gather(values))
