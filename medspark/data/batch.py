"""The batches that readers yield: one rank's slice of a global batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Batch", "Reader", "Targets", "batch_of", "pinned", "to_unit"]

Pixels = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]
# Classes (B,) as integers, or findings (B, K) as 0/1 floats, as Manifest.targets returns them.
Targets = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Images (B, C, H, W) as stored integers, their labels, and their dataset rows (B,).

    Labels are classes (B,), or findings (B, K) as 0/1 floats. ``global_size`` is the number of
    images of this step over all ranks. Multiplied by ``weight``, the ranks' mean losses have the
    mean over the global batch as their mean.
    """

    images: Tensor
    labels: Tensor
    rows: Integers
    weight: float
    global_size: int
    epoch: int
    step: int


class Reader(Protocol):
    """Yields one rank's batches of a split, per epoch."""

    @property
    def steps(self) -> int:
        """The number of batches in an epoch, the same on every rank."""

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on."""


def batch_of(
    images: Pixels,
    labels: Targets,
    rows: Integers,
    *,
    weight: float,
    global_size: int,
    epoch: int,
    step: int,
) -> Batch:
    """Return arrays (B, H, W, C) as a Batch.

    The images are not copied, so as (B, C, H, W) they are channels-last.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(pixels, torch.from_numpy(labels), rows, weight, global_size, epoch, step)


def pinned(batch: Batch) -> Batch:
    """Return ``batch`` in page-locked memory; a GPU copies from it while the host goes on."""
    return replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """Return stored integers as floats in [0, 1] on ``device``; integers are sent, not floats."""
    largest = 255 if images.dtype == torch.uint8 else 65535
    return torch.div(images.to(device, non_blocking=True), largest)
