"""Random numbers of attacks, by key: an image draws the same in any batch, on any worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medspark.seeding import derive, uniform


@dataclass(frozen=True)
class KeyedRandom:
    """Random numbers that depend on (seed, what they are for, the image's row) alone.

    ``rows`` (B,) are the images' numbers in the whole data set.
    """

    seed: int
    rows: Tensor

    @classmethod
    def for_whole(cls, images: Tensor, *, seed: int = 0) -> KeyedRandom:
        """Return the random numbers of images that are the whole data set."""
        return cls(seed, torch.arange(len(images)))

    def of(self, chosen: Tensor) -> KeyedRandom:
        """Return the numbers of some of the images, by their place in the batch or by mask."""
        return KeyedRandom(self.seed, self.rows[chosen.cpu()])

    def numbers(self, count: int, purpose: str) -> Tensor:
        """Return ``count`` numbers in [0, 1) for each image, (B, ``count``)."""
        index = self.rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(count)
        index = index + np.arange(count, dtype=np.uint64)
        drawn = uniform(derive(self.seed, purpose), index).astype(np.float32)
        # A float64 just below one would round up to it.
        return torch.from_numpy(np.minimum(drawn, np.float32(1 - 2**-24)))

    def noise(self, images: Tensor, purpose: str) -> Tensor:
        """Return numbers in [0, 1) like ``images``, each image its own."""
        drawn = self.numbers(images[0].numel(), purpose)
        return drawn.view(images.shape).to(images.device, images.dtype)
