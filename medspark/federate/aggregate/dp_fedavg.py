"""DP-FedAvg with a fixed denominator: the private mean of clipped updates (McMahan et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from medspark.federate.aggregate.norm_clipping import clipped
from medspark.federate.aggregate.rule import Measured, Needs, Rule, Weighing

__all__ = ["DPFedAvg"]


class DPFedAvg(Rule):
    """The sum of clipped updates over the number of clients expected, with noise for privacy.

    No client moves the sum by more than the bound, and the noise on the sum has a standard
    deviation of ``multiplier`` bounds. Images do not count: their number would be private too. A
    round that nobody was drawn for is all noise.
    """

    needs: ClassVar[Needs] = "norms"
    separable: ClassVar[bool] = True

    bound: float = Field(1.0, gt=0, description="greatest Euclidean norm of an update")
    multiplier: float = Field(1.0, ge=0, description="noise on the sum, in units of the bound (z)")
    expected: float = Field(10.0, gt=0, description="clients that take part in a round on average")

    @property
    def least(self) -> int:
        """Zero: how many were drawn is private."""
        return 0

    def weigh(self, seen: Measured) -> Weighing:
        """Clip, and ask for noise on the mean."""
        noise = self.multiplier * self.bound / self.expected
        return Weighing(clipped(seen.norms, self.bound), self.expected, noise=noise)
