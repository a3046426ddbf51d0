"""FedYogi: Yogi on the server, its gradient the mean update (Reddi et al. 2021, algorithm 2)."""

from __future__ import annotations

import numpy as np

from medspark.federate.aggregate.fedadam import FedAdam
from medspark.federate.aggregate.rule import Vector

__all__ = ["FedYogi"]


class FedYogi(FedAdam):
    """FedAdam whose memory of squares moves by the size of the square alone, up or down."""

    def remembered(self, second: Vector, square: Vector) -> Vector:
        """Return the memory of squares (c,) after one more."""
        moved: Vector = second - (1 - self.beta2) * square * np.sign(second - square)
        return moved
