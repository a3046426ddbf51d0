"""FedYogi: Yogi on the server, with the mean update as its gradient (Reddi et al. 2021, alg. 2)."""

from __future__ import annotations

import numpy as np

from medspark.federate.aggregate.fedadam import FedAdam
from medspark.federate.aggregate.rule import Vector

__all__ = ["FedYogi"]


class FedYogi(FedAdam):
    """FedAdam, but the memory of squares moves up or down by the square times (1 - beta2)."""

    def remembered(self, second: Vector, square: Vector) -> Vector:
        """Return the memory of squares (c,) after ``square``."""
        moved: Vector = second - (1 - self.beta2) * square * np.sign(second - square)
        return moved
