"""RFA: the geometric median by the smoothed Weiszfeld algorithm (Pillutla et al. 2022).

The geometric median is a weighted mean v = sum l_i u_i with sum l_i = 1. The search for the weights
l needs only the n x n squared distances D of the updates, because
|v - u_j|^2 = (D l)_j - l D l / 2. So it needs no further pass over the updates.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["GeometricMedian"]

# The search ends after this many steps, or if no weight changes by this much.
_MOST_STEPS = 20_000
_SETTLED = 1e-13


class GeometricMedian(Rule):
    """The point with the smallest sum of distances, weighted by the clients' images.

    It stays near the honest updates if malicious clients hold less than half of all images.
    """

    needs: ClassVar[Needs] = "products"

    smoothing: float = Field(
        1e-6, gt=0, description="smallest distance that the weights are divided by (nu)"
    )

    def weigh(self, seen: Measured) -> Weighing:
        """Return the weights of the geometric median."""
        shares = seen.counts / seen.counts.sum()
        weights, distances = shares, seen.distances
        for _ in range(_MOST_STEPS):
            drawn = shares / np.maximum(self.smoothing, _away(weights, distances))
            following = drawn / drawn.sum()
            settled = np.abs(following - weights).max() < _SETTLED
            weights = following
            if settled:
                break
        return Weighing(weights, 1.0)


def _away(weights: Vector, distances: Matrix) -> Vector:
    """Return the distance (n,) of each update from the mean with ``weights``."""
    towards = distances @ weights
    away: Vector = np.sqrt(np.maximum(towards - weights @ towards / 2, 0.0))
    return away
