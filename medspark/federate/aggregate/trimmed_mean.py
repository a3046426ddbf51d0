"""The coordinate-wise trimmed mean (Yin et al. 2018)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Rule, Vector, Weighing

__all__ = ["TrimmedMean"]


class TrimmedMean(Rule):
    """The mean of every weight without its largest and smallest values.

    It withstands as many malicious clients as it cuts off values at each end.
    """

    trim: float = Field(0.2, ge=0, lt=0.5, description="share of values cut off at each end")

    def cut(self, clients: int) -> int:
        """Return how many of ``clients`` values are cut off at each end."""
        # .29 is not a binary fraction: .29 x 100 is 28.999999999999996.
        return int(self.trim * clients + 1e-9)

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:  # noqa: ARG002
        """Return the trimmed mean (c,) of each column, summed in order of size."""
        cut = self.cut(len(block))
        kept = np.sort(block, axis=0)[cut : len(block) - cut]
        mean: Vector = kept.mean(axis=0)
        return mean
