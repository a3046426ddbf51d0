"""Evaluate the network on validation images, clean and under PGD; each rank takes a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Integers
from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.result import ConditionFigures
from medspark.evaluate.robust import Array, evaluate
from medspark.seeding import derive
from medspark.shards.plan import permute, share
from medspark.train.world import World

__all__ = ["gatherer", "slices", "validate"]


def validate(
    model: nn.Module,
    split: MappedSplit,
    *,
    threat: ThreatModel,
    images: int,
    steps: int,
    seed: int,
    world: World,
) -> tuple[ConditionFigures, ConditionFigures]:
    """Return the metrics of ``model``, clean and under PGD.

    They are of at most ``images`` images, the same ones in every call.
    """
    count = min(images, len(split))
    rows = np.sort(permute(np.arange(count), len(split), derive(seed, "validation")))
    config = AttackSettings(
        attacks=("pgd",), norm=threat.norm, eps=(threat.eps,), steps=steps, sanity_images=0
    )
    batches = slices(split, rows, batch_size=config.batch_size, world=world)
    result = evaluate(model, batches, config, gather=gatherer(world))
    return result.clean, ConditionFigures.model_validate(result.attacks[0].metrics)


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
