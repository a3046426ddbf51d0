"""RFA: the geometric median by the smoothed Weiszfeld algorithm (Pillutla et al. 2022).

The median is a mean with weights that are found, so that every step of the search is arithmetic
on the n x n squared distances D of the updates: of v = sum l_i u_i with sum l_i = 1,
|v - u_j|^2 = (D l)_j - l D l / 2. The search costs no further pass over the updates.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["GeometricMedian"]

# Steps after which the search ends in any case, and the change of a weight that ends it.
_MOST_STEPS = 20_000
_SETTLED = 1e-13


class GeometricMedian(Rule):
    """The point of the least sum of distances, where each client counts by its images.

    It stays near the honest updates while liars hold less than half of all images.
    """

    needs: ClassVar[Needs] = "products"

    smoothing: float = Field(
        1e-6, gt=0, description="distance below which an update draws no harder (nu)"
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
    """Return how far (n,) each update is from the mean that has ``weights``."""
    towards = distances @ weights
    away: Vector = np.sqrt(np.maximum(towards - weights @ towards / 2, 0.0))
    return away
