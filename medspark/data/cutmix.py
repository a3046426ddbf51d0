"""CutMix (Yun et al. 2019): each image gets a patch of another one, and a share of its label.

The images are augmented first, then mixed, and attacked afterwards (Rebuffi et al. 2021). Partners
come from the global batch by a permutation, so each image of a step gives one patch and gets one.
All of it depends on (seed, epoch, step) only, so it is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medspark.data.batch import Batch, Integers
from medspark.data.native import NativeReader
from medspark.seeding import derive, uniform
from medspark.shards.plan import permute, share

__all__ = ["CutMixReader", "Patches", "patches_of"]


@dataclass(frozen=True)
class Patches:
    """What the N images of a global batch get: position of the partner (N,), and where, (N, H, W).

    ``inside`` is true where the partner is seen.
    """

    partners: Integers
    inside: npt.NDArray[np.bool_]

    @property
    def shares(self) -> npt.NDArray[np.float32]:
        """The share (N,) of each image that is its own, which is the share of its label as well."""
        own: npt.NDArray[np.float64] = 1 - self.inside.mean((1, 2), dtype=np.float64)
        return own.astype(np.float32)


def patches_of(size: int, side: tuple[int, int], *, alpha: float, key: int) -> Patches:
    """Return the patches of a global batch of ``size`` images of ``side`` (H, W) in pixels.

    The share that an image keeps is drawn from Beta(``alpha``, ``alpha``). The patch has the
    image's proportions and a uniform centre; what of it lies outside is cut off.
    """
    numbers = np.arange(size)
    kept = np.random.default_rng(derive(key, "share")).beta(alpha, alpha, size)
    rows, columns = (
        _span(length, np.sqrt(1 - kept), uniform(derive(key, axis), numbers))
        for length, axis in zip(side, ("y", "x"), strict=True)
    )
    partners = permute(numbers, size, derive(key, "partners"))
    return Patches(partners, rows[:, :, None] & columns[:, None, :])


def _span(
    length: int, part: npt.NDArray[np.float64], place: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Return which of ``length`` pixels lie within the ``part`` of them around ``place``."""
    covered = np.floor(part * length)
    first = np.floor(place * length) - covered // 2
    after = np.arange(length) - first[:, None]
    inside: npt.NDArray[np.bool_] = (after >= 0) & (after < covered[:, None])
    return inside


class CutMixReader:
    """Yields the batches of ``reader`` with mixed images and labels.

    Mixed classes are float probabilities (B, 1, K), for ``classes`` K. Mixed findings (B, K) are
    the weighted mean of both images' findings.
    """

    def __init__(
        self,
        reader: NativeReader,
        *,
        alpha: float,
        classes: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self._reader = reader
        self._alpha, self._classes, self._seed = alpha, classes, seed
        self._rank, self._world = rank, world

    @property
    def steps(self) -> int:
        """The number of batches in an epoch, the same on every rank."""
        return self._reader.steps

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on; earlier ones are not read."""
        plan = self._reader.plan(epoch)
        for batch in self._reader.batches(epoch, start=start):
            rows = plan.batch(batch.step)
            patches = patches_of(
                len(rows),
                (batch.images.shape[2], batch.images.shape[3]),
                alpha=self._alpha,
                key=derive(self._seed, "cutmix", epoch, batch.step),
            )
            mine = slice(*share(len(rows), self._world, self._rank))
            others, labels = self._reader.read(rows[patches.partners[mine]], epoch)
            images = batch.images.permute(0, 2, 3, 1).numpy()  # a copy of the stored images
            inside = patches.inside[mine]
            images[inside] = others.permute(0, 2, 3, 1).numpy()[inside]
            own = torch.from_numpy(patches.shares[mine])
            yield replace(batch, labels=self._mixed(batch.labels, labels, own))

    def _mixed(self, first: Tensor, second: Tensor, own: Tensor) -> Tensor:
        if first.ndim == 2:
            return torch.lerp(second.float(), first.float(), own[:, None])
        known = torch.nn.functional.one_hot(torch.stack([second, first]), self._classes).float()
        return torch.lerp(known[0], known[1], own[:, None])[:, None]
