"""ALIE, "a little is enough": hide within the spread of the honest updates (Baruch et al. 2019)."""

from __future__ import annotations

from statistics import NormalDist
from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.adversary.adversary import Adversary, Known
from medspark.federate.aggregate.rule import Vector

__all__ = ["Alie"]


class Alie(Adversary):
    """Send mean - z x deviation of the updates that are known, weight by weight.

    Without a z it is the largest with which enough honest clients are further off still.
    """

    needs_honest: ClassVar[bool] = True

    z: float | None = Field(
        None, ge=0, description="deviations from the mean; by default as many as can hide"
    )

    def send(self, update: Vector, known: Known) -> Vector:
        """Return the vector that all malicious clients send; unknown updates count as its own."""
        honest = update[None] if known.honest is None else known.honest
        z = self.hidden(known.clients, known.liars) if self.z is None else self.z
        sent: Vector = np.mean(honest, axis=0) - z * np.std(honest, axis=0)
        return sent

    def hidden(self, clients: int, liars: int) -> float:
        """Return z: n clients with m liars need s = n // 2 + 1 - m honest ones on their side."""
        honest, supporters = clients - liars, clients // 2 + 1 - liars
        share = (honest - supporters) / max(honest, 1)
        return max(0.0, NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9)))
