"""RLR: step back in every weight on whose direction too few agree (Ozdayi et al. 2021)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Rule, Vector, Weighing

__all__ = ["RobustLearningRate"]


class RobustLearningRate(Rule):
    """The weighted mean, negated in weights where the signs add up to less than the threshold."""

    threshold: float = Field(
        0.4, ge=0, le=1, description="least size of the sum of signs, as a share of the clients"
    )

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:
        """Return the mean (c,) of each column, with its sign or against it."""
        agreed = np.abs(np.sign(block).sum(axis=0)) >= self.threshold * len(block)
        return np.where(agreed, 1.0, -1.0) * super().combine(block, weighing, references)
