"""RLR: negate the step of every weight on whose sign too few clients agree (Ozdayi et al. 2021)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Rule, Vector, Weighing

__all__ = ["RobustLearningRate"]


class RobustLearningRate(Rule):
    """The weighted mean; a weight is negated if its signs add up to less than the threshold."""

    threshold: float = Field(
        0.4, ge=0, le=1, description="smallest absolute sum of signs, as a share of the clients"
    )

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:
        """Return the mean (c,) of each column, negated if too few clients agree on the sign."""
        agreed = np.abs(np.sign(block).sum(axis=0)) >= self.threshold * len(block)
        return np.where(agreed, 1.0, -1.0) * super().combine(block, weighing, references)
