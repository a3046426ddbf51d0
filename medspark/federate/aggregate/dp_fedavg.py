"""DP-FedAvg with a fixed denominator: the private mean of clipped updates (McMahan et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from medspark.federate.aggregate.norm_clipping import clipped
from medspark.federate.aggregate.rule import Measured, Needs, Rule, Weighing

__all__ = ["DPFedAvg"]


class DPFedAvg(Rule):
    """The sum of clipped updates over the expected number of clients, with noise for privacy.

    No client moves the sum by more than the bound. The noise on the sum has a standard deviation of
    ``multiplier`` bounds. Numbers of images do not count, because they are private too. The outcome
    of a round without clients is noise only.
    """

    needs: ClassVar[Needs] = "norms"
    separable: ClassVar[bool] = True

    bound: float = Field(1.0, gt=0, description="largest Euclidean norm of an update")
    multiplier: float = Field(
        1.0, ge=0, description="standard deviation of the noise on the sum, in bounds (z)"
    )
    expected: float = Field(10.0, gt=0, description="mean number of clients in a round")

    @property
    def least(self) -> int:
        """The fewest clients: 0, because the number of clients in a round is private."""
        return 0

    def weigh(self, seen: Measured) -> Weighing:
        """Return the clipping factors, and the noise on the mean."""
        noise = self.multiplier * self.bound / self.expected
        return Weighing(clipped(seen.norms, self.bound), self.expected, noise=noise)
