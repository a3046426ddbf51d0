"""FoolsGold: clients that send similar updates count less (Fung et al. 2020, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["FoolsGold"]


class FoolsGold(Rule):
    """The sum of the updates, each times how unlike its history is to all others', over n.

    Clients that have always agreed are taken for one person's and do not count at all: of equal
    updates the outcome is zero, as published.
    """

    needs: ClassVar[Needs] = "products"
    remembers: ClassVar[bool] = True

    def weigh(self, seen: Measured) -> Weighing:
        """Count how unlike the others a client is."""
        unlike = _unlike(seen.cosines)
        return Weighing(unlike, float(len(unlike)), rejected=unlike == 0)


def _unlike(cosines: Matrix) -> Vector:
    alike = cosines - np.diag(np.full(len(cosines), np.inf))
    closest = alike.max(axis=1)
    # Pardon who is like somebody that is even more like a third: honest clients are not punished
    # for the likeness of sybils. Nobody is like anybody by less than nothing.
    ratio = np.divide(
        closest[:, None], closest[None, :], out=np.ones_like(alike), where=closest[None, :] > 0
    )
    pardoned = np.where(closest[:, None] < closest[None, :], alike * ratio, alike)
    unlike = np.clip(1 - pardoned.max(axis=1), 0.0, 1.0)
    if unlike.max() > 0:
        unlike = unlike / unlike.max()
    unlike = np.clip(unlike, 1e-300, 0.99)
    factors: Vector = np.clip(np.log(unlike / (1 - unlike)) + 0.5, 0.0, 1.0)
    return factors
