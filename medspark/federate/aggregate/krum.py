"""Krum and Multi-Krum: keep the updates with the closest neighbours (Blanchard et al. 2017).

Two published conventions pick different clients. ``blanchard``, of the paper and Flower, adds up
the squared distances to the n - f - 2 nearest others, and Multi-Krum keeps n - f - 2 updates.
``allouah`` adds up those to the n - f - 1 nearest others and keeps n - f updates (Allouah et al.
2023, ByzFL).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["Krum", "MultiKrum", "krum_scores"]

Convention = Literal["blanchard", "allouah"]


def krum_scores(distances: Matrix, neighbours: int) -> Vector:
    """Return for each update (n,) the sum of its ``neighbours`` smallest squared distances."""
    others = np.sort(distances + np.diag(np.full(len(distances), np.inf)), axis=1)
    scores: Vector = others[:, :neighbours].sum(axis=1)
    return scores


class Krum(Rule):
    """The single update with the closest neighbours."""

    needs: ClassVar[Needs] = "products"

    adversaries: int = Field(1, ge=0, description="largest number of malicious clients (f)")
    convention: Convention = Field(
        "blanchard", description="blanchard scores n - f - 2 neighbours, allouah n - f - 1"
    )

    @property
    def least(self) -> int:
        """The fewest clients: 2f + 3 (Blanchard et al. 2017), or 2f + 2 in allouah."""
        return 2 * self.adversaries + (3 if self.convention == "blanchard" else 2)

    def neighbours(self, clients: int) -> int:
        """Return how many other updates count in a score."""
        return clients - self.adversaries - (2 if self.convention == "blanchard" else 1)

    def keeps(self, clients: int) -> int:  # noqa: ARG002
        """Return how many updates the outcome is the mean of."""
        return 1

    def weigh(self, seen: Measured) -> Weighing:
        """Return weight 1 for the updates with the smallest scores, and 0 for the others."""
        clients = len(seen.clients)
        scores = krum_scores(seen.distances, self.neighbours(clients))
        kept = np.zeros(clients, dtype=bool)
        kept[np.argsort(scores, kind="stable")[: self.keeps(clients)]] = True
        return _only(kept)


class MultiKrum(Krum):
    """The plain mean of the updates with the closest neighbours."""

    keep: int | None = Field(
        None, ge=1, description="number of kept updates; default: n - f - 2, or n - f in allouah"
    )

    def keeps(self, clients: int) -> int:
        """Return how many updates the outcome is the mean of."""
        usual = clients - self.adversaries - (2 if self.convention == "blanchard" else 0)
        return usual if self.keep is None else min(self.keep, clients)


def _only(kept: npt.NDArray[np.bool_]) -> Weighing:
    return Weighing(kept.astype(np.float64), float(kept.sum()), rejected=~kept)
