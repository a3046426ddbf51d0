"""Krum and Multi-Krum: trust the updates that have the closest neighbours (Blanchard et al. 2017).

Two conventions are published, and pick different clients. ``blanchard`` adds up the squared
distances to the n - f - 2 nearest others, as the paper and Flower do, and Multi-Krum keeps as many;
``allouah`` takes the n - f nearest with the update itself among them, n - f - 1 others, and keeps
n - f (Allouah et al. 2023, ByzFL).
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
    """The one update whose nearest neighbours are the closest."""

    needs: ClassVar[Needs] = "products"

    adversaries: int = Field(1, ge=0, description="most clients of a round that lie (f)")
    convention: Convention = Field(
        "blanchard", description="neighbours that count: n - f - 2 others, or n - f - 1 in allouah"
    )

    @property
    def least(self) -> int:
        """2f + 3 (Blanchard et al. 2017), or the smallest majority of honest clients."""
        return 2 * self.adversaries + (3 if self.convention == "blanchard" else 2)

    def neighbours(self, clients: int) -> int:
        """Return how many other updates count in a score."""
        return clients - self.adversaries - (2 if self.convention == "blanchard" else 1)

    def keeps(self, clients: int) -> int:  # noqa: ARG002
        """Return how many updates the outcome is the mean of."""
        return 1

    def weigh(self, seen: Measured) -> Weighing:
        """Count the updates of the smallest scores alike, and the others not at all."""
        clients = len(seen.clients)
        scores = krum_scores(seen.distances, self.neighbours(clients))
        kept = np.zeros(clients, dtype=bool)
        kept[np.argsort(scores, kind="stable")[: self.keeps(clients)]] = True
        return _only(kept)


class MultiKrum(Krum):
    """The plain mean of the updates whose nearest neighbours are the closest."""

    keep: int | None = Field(
        None, ge=1, description="updates that are kept; n - f - 2 by default, n - f in allouah"
    )

    def keeps(self, clients: int) -> int:
        """Return how many updates the outcome is the mean of."""
        usual = clients - self.adversaries - (2 if self.convention == "blanchard" else 0)
        return usual if self.keep is None else min(self.keep, clients)


def _only(kept: npt.NDArray[np.bool_]) -> Weighing:
    return Weighing(kept.astype(np.float64), float(kept.sum()), rejected=~kept)
