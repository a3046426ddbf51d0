"""Neurotoxin: move weights alone that honest clients do not use (Zhang et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.adversary.adversary import Known
from medspark.federate.adversary.badnets import BadNets
from medspark.federate.aggregate.rule import Vector

__all__ = ["Neurotoxin"]


class Neurotoxin(BadNets):
    """BadNets that keeps off the weights which the last round moved the most, in either direction.

    Those that it changes are not overwritten soon, so that the backdoor lasts.
    """

    needs_last_change: ClassVar[bool] = True

    radius: float | None = Field(
        0.2, gt=0, description="longest way from the round's weights (PGD); none: any"
    )
    every: int = Field(1, ge=1, description="steps between projections; the last step has one too")
    spared: float = Field(
        0.05, ge=0, le=1, description="share of the weights, the most used, that are left alone"
    )

    def constrain(self, update: Vector, known: Known) -> Vector:
        """Return the update without the most used weights, within the radius."""
        if known.last_change is not None:
            count = round(self.spared * len(update))
            # By size: with its sign, as in published code, weights that fall would count as unused.
            used = np.argpartition(np.abs(known.last_change), len(update) - count - 1)
            update = update.copy()
            update[used[len(update) - count :]] = 0.0
        return super().constrain(update, known)
