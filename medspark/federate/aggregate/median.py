"""The coordinate-wise median (Yin et al. 2018)."""

from __future__ import annotations

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Rule, Vector, Weighing

__all__ = ["Median"]


class Median(Rule):
    """The median of every weight; within the honest values if more than half are honest."""

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:  # noqa: ARG002
        """Return the median (c,) of each column; every client counts the same."""
        ranked = np.sort(block, axis=0)
        low, high = ranked[(len(block) - 1) // 2], ranked[len(block) // 2]
        middle: Vector = low + (high - low) / 2
        return middle
