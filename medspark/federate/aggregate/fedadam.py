"""FedAdam: Adam on the server, with the mean update as its gradient (Reddi et al. 2021, alg. 2)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Rule, State, Vector

__all__ = ["FedAdam"]


class FedAdam(Rule):
    """The weighted mean divided by its usual size; like the paper, without bias correction."""

    separable: ClassVar[bool] = True

    rate: float = Field(0.01, gt=0, description="learning rate of the server")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean update")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the squared mean update")
    tau: float = Field(1e-3, gt=0, description="adaptivity: added to the usual size of the update")

    def step(self, change: Vector, state: State) -> tuple[Vector, State]:
        """Return the adapted change; the memory of squares starts at tau squared."""
        first = state.get("first", np.zeros_like(change))
        second = state.get("second", np.full_like(change, self.tau**2))
        first = self.beta1 * first + (1 - self.beta1) * change
        second = self.remembered(second, np.square(change))
        adapted = self.rate * first / (np.sqrt(second) + self.tau)
        return adapted, {"first": first, "second": second}

    def remembered(self, second: Vector, square: Vector) -> Vector:
        """Return the memory of squares (c,) after ``square``."""
        return self.beta2 * second + (1 - self.beta2) * square
