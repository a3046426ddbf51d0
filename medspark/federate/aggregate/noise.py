"""Keyed Gaussian noise: a weight gets the same noise in any chunk and on any machine."""

from __future__ import annotations

import numpy as np

from medspark.federate.aggregate.rule import Vector
from medspark.seeding import derive, uniform

__all__ = ["gaussian"]


def gaussian(seed: int, round: int, coordinates: slice) -> Vector:
    """Return standard normal noise (c,) for ``coordinates`` (Box and Muller 1958).

    The seed determines the noise. Whoever knows the seed can subtract the noise, so privacy needs a
    secret seed.
    """
    index = np.arange(coordinates.start, coordinates.stop, dtype=np.uint64)
    radius = uniform(derive(seed, "aggregate noise", "radius", round), index)
    angle = uniform(derive(seed, "aggregate noise", "angle", round), index)
    noise: Vector = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    return noise
