"""FoolsGold: clients that send similar updates count less (Fung et al. 2020, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["FoolsGold"]


class FoolsGold(Rule):
    """The mean of the updates, each weighted by how much its history differs from all others.

    Clients with the same history count as copies of one attacker and get weight 0. So the outcome
    of equal updates is zero, as published.
    """

    needs: ClassVar[Needs] = "products"
    remembers: ClassVar[bool] = True

    def weigh(self, seen: Measured) -> Weighing:
        """Return the difference of each client from the others, in [0, 1]."""
        unlike = _unlike(seen.cosines)
        return Weighing(unlike, float(len(unlike)), rejected=unlike == 0)


def _unlike(cosines: Matrix) -> Vector:
    alike = cosines - np.diag(np.full(len(cosines), np.inf))
    closest = alike.max(axis=1)
    # Pardoning: lower the similarity to a client that is even more similar to a third one, so that
    # honest clients are not punished for the similarity of sybils.
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
