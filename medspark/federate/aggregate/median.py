"""The median of every weight by itself (Yin et al. 2018)."""

from __future__ import annotations

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Rule, Vector, Weighing

__all__ = ["Median"]


class Median(Rule):
    """The coordinate-wise median; within the honest values while fewer than half of all lie."""

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:  # noqa: ARG002
        """Return the median (c,) of each column; images do not count."""
        ranked = np.sort(block, axis=0)
        low, high = ranked[(len(block) - 1) // 2], ranked[len(block) // 2]
        middle: Vector = low + (high - low) / 2
        return middle
