"""Keyed random numbers for attacks: an image gets the same ones in any batch, on any worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medspark.seeding import derive, uniform


@dataclass(frozen=True)
class KeyedRandom:
    """Random numbers that depend only on (seed, purpose, the image's row).

    ``rows`` (B,) are the images' row numbers in the dataset.
    """

    seed: int
    rows: Tensor

    @classmethod
    def for_whole(cls, images: Tensor, *, seed: int = 0) -> KeyedRandom:
        """Return the random numbers for ``images`` that are a whole dataset, rows 0 to B - 1."""
        return cls(seed, torch.arange(len(images)))

    def of(self, chosen: Tensor) -> KeyedRandom:
        """Return the numbers of some images; ``chosen`` holds positions in the batch, or a mask."""
        return KeyedRandom(self.seed, self.rows[chosen.cpu()])

    def numbers(self, count: int, purpose: str) -> Tensor:
        """Return ``count`` numbers in [0, 1) for each image, (B, ``count``)."""
        index = self.rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(count)
        index = index + np.arange(count, dtype=np.uint64)
        drawn = uniform(derive(self.seed, purpose), index).astype(np.float32)
        # A float64 just below 1 would round up to 1.
        return torch.from_numpy(np.minimum(drawn, np.float32(1 - 2**-24)))

    def noise(self, images: Tensor, purpose: str) -> Tensor:
        """Return numbers in [0, 1) in the shape of ``images`` (B, C, H, W)."""
        drawn = self.numbers(images[0].numel(), purpose)
        return drawn.view(images.shape).to(images.device, images.dtype)
