"""FedAvgM: server momentum on the mean update (Hsu et al. 2019, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Rule, State, Vector

__all__ = ["FedAvgM"]


class FedAvgM(Rule):
    """Momentum on the weighted mean: v = momentum v + mean, and the change is rate v."""

    separable: ClassVar[bool] = True

    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the velocity")
    rate: float = Field(1.0, gt=0, description="learning rate of the server")

    def step(self, change: Vector, state: State) -> tuple[Vector, State]:
        """Return the change (c,) with momentum, and the velocity."""
        velocity = self.momentum * state.get("velocity", np.zeros_like(change)) + change
        return self.rate * velocity, {"velocity": velocity}
