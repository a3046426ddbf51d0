"""Weak differential privacy: norm clipping and a little noise on the mean (Sun et al. 2019)."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from medspark.federate.aggregate.norm_clipping import NormClipping
from medspark.federate.aggregate.rule import Measured, Weighing

__all__ = ["WeakDP"]


class WeakDP(NormClipping):
    """Norm clipping with Gaussian noise on every weight, too little noise to protect privacy."""

    sigma: float = Field(0.025, ge=0, description="standard deviation of the noise on a weight")

    def weigh(self, seen: Measured) -> Weighing:
        """Return the weighing of norm clipping, with noise."""
        return replace(super().weigh(seen), noise=self.sigma)
