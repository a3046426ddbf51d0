"""Augmentation by flips, small shifts and turns, keyed by (seed, epoch, row): the same on any rank.

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
    """Return ``images`` (B, H, W, C), changed by random numbers of (row, epoch).

    The margin that a shift uncovers repeats the edge, because black margins do not look like
    anatomy. ``images`` may be changed in place.
    """
    if config.flip > 0 or config.shift > 0:
        images = _flipped_and_shifted(images, rows, config, seed=seed, epoch=epoch)
    return _turned(images, rows, config.turn, seed=seed, epoch=epoch) if config.turn else images


def _flipped_and_shifted(
    images: Pixels, rows: Integers, config: AugmentConfig, *, seed: int, epoch: int
) -> Pixels:
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


def _turned(images: Pixels, rows: Integers, probability: float, *, seed: int, epoch: int) -> Pixels:
    chance = uniform(derive(seed, "turn", epoch), rows) / probability
    quarters = np.where(chance < 1, 1 + np.floor(3 * chance), 0)
    if images.shape[1] != images.shape[2]:
        quarters[quarters > 0] = 2
    for number in (1, 2, 3):
        which = quarters == number
        if which.any():
            images[which] = np.rot90(images[which], number, axes=(1, 2))
    return images


def _places(side: int, chance: Floats, largest: float) -> Integers:
    reach = round(largest * side)
    offset = np.floor(chance * (2 * reach + 1)).astype(np.int64) - reach
    places: Integers = np.clip(np.arange(side) + offset[:, None], 0, side - 1)
    return places
