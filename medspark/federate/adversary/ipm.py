"""IPM, inner product manipulation: a multiple of the honest mean's opposite (Xie et al. 2020)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.adversary.adversary import Adversary, Known
from medspark.federate.aggregate.rule import Vector

__all__ = ["InnerProduct"]


class InnerProduct(Adversary):
    """Send - strength x the mean of the updates that are known."""

    needs_honest: ClassVar[bool] = True

    strength: float = Field(0.5, gt=0, description="length of what is sent, in honest means")

    def send(self, update: Vector, known: Known) -> Vector:
        """Return the vector that all malicious clients send; unknown updates count as its own."""
        honest = update[None] if known.honest is None else known.honest
        sent: Vector = -self.strength * np.mean(honest, axis=0)
        return sent
