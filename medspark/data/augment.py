"""Augmentation by flips and small shifts, keyed by (seed, epoch, row): the same on any rank.

Images are augmented before they are attacked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medspark.data.batch import Integers, Pixels
from medspark.data.config import AugmentConfig
from medspark.seeding import derive, uniform

__all__ = ["augment"]

Floats = npt.NDArray[np.float64]


def augment(
    images: Pixels, rows: Integers, *, config: AugmentConfig, seed: int, epoch: int
) -> Pixels:
    """Return ``images`` (B, H, W, C), flipped and shifted by random numbers of (row, epoch).

    The margin that a shift uncovers repeats the edge, because black margins do not look like
    anatomy. ``images`` may be changed in place.
    """
    if config.flip == 0 and config.shift == 0:
        return images
    flipped = uniform(derive(seed, "flip", epoch), rows) < config.flip
    if config.shift > 0:
        return _moved(images, rows, flipped, config.shift, seed=seed, epoch=epoch)
    if flipped.any():
        images[flipped] = images[flipped, :, ::-1]
    return images


def _moved(
    images: Pixels, rows: Integers, flipped: Pixels, largest: float, *, seed: int, epoch: int
) -> Pixels:
    _, height, width, _ = images.shape
    y = _places(height, uniform(derive(seed, "shift-y", epoch), rows), largest)
    x = _places(width, uniform(derive(seed, "shift-x", epoch), rows), largest)
    x = np.where(flipped[:, None], x[:, ::-1], x)
    number = np.arange(len(images))[:, None, None]
    moved: Pixels = images[number, y[:, :, None], x[:, None, :]]
    return moved


def _places(side: int, chance: Floats, largest: float) -> Integers:
    reach = round(largest * side)
    offset = np.floor(chance * (2 * reach + 1)).astype(np.int64) - reach
    places: Integers = np.clip(np.arange(side) + offset[:, None], 0, side - 1)
    return places
