"""Norm clipping (NDC): shorten updates to a bound, then take the mean (Sun et al. 2019)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Measured, Needs, Rule, Vector, Weighing

__all__ = ["NormClipping", "clipped"]


def clipped(norms: Vector, bound: float) -> Vector:
    """Return the factors (n,) that shorten vectors with these ``norms`` to at most ``bound``."""
    return np.minimum(1.0, bound / np.maximum(norms, np.finfo(np.float64).tiny))


class NormClipping(Rule):
    """The mean of the updates, shortened to the bound, weighted by the clients' images."""

    needs: ClassVar[Needs] = "norms"
    separable: ClassVar[bool] = True

    bound: float = Field(2.0, gt=0, description="largest Euclidean norm of an update")

    def weigh(self, seen: Measured) -> Weighing:
        """Return each client's number of images times its clipping factor."""
        total = float(seen.counts.sum())
        return Weighing(seen.counts * clipped(seen.norms, self.bound), total)
