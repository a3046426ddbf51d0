"""Norm clipping: no update is longer than a bound, then the mean (Sun et al. 2019; NDC)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Measured, Needs, Rule, Vector, Weighing

__all__ = ["NormClipping", "clipped"]


def clipped(norms: Vector, bound: float) -> Vector:
    """Return the factors (n,) that bring vectors of these norms to at most ``bound``."""
    return np.minimum(1.0, bound / np.maximum(norms, np.finfo(np.float64).tiny))


class NormClipping(Rule):
    """The mean of the updates, none longer than the bound, weighted by the clients' images."""

    needs: ClassVar[Needs] = "norms"
    separable: ClassVar[bool] = True

    bound: float = Field(2.0, gt=0, description="greatest Euclidean norm of an update")

    def weigh(self, seen: Measured) -> Weighing:
        """Count a client by its images, less where its update is too long."""
        total = float(seen.counts.sum())
        return Weighing(seen.counts * clipped(seen.norms, self.bound), total)
