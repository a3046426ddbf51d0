"""Bulyan: repeat Krum's choice, then average the values near the median (El Mhamdi et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.krum import krum_scores
from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Vector, Weighing

__all__ = ["Bulyan"]


class Bulyan(Rule):
    """Krum picks n - 2f updates; each weight is the mean of the n - 4f values near the median."""

    needs: ClassVar[Needs] = "products"

    adversaries: int = Field(1, ge=0, description="largest number of malicious clients (f)")

    @property
    def least(self) -> int:
        """The fewest clients: 4f + 3."""
        return 4 * self.adversaries + 3

    def weigh(self, seen: Measured) -> Weighing:
        """Pick n - 2f updates, one at a time; Krum scores only the updates not yet picked.

        Two clients that are each other's nearest have equal scores; the first one is picked.
        """
        clients, distances = len(seen.clients), seen.distances
        left = np.arange(clients)
        for _ in range(clients - 2 * self.adversaries):
            # Of m remaining updates, m - f - 2 neighbours count, but at least one.
            neighbours = max(1, len(left) - self.adversaries - 2)
            scores = krum_scores(distances[np.ix_(left, left)], neighbours)
            left = np.delete(left, int(scores.argmin()))
        picked = np.ones(clients, dtype=bool)
        picked[left] = False
        return Weighing(picked.astype(np.float64), float(picked.sum()), rejected=~picked)

    def combine(self, block: Matrix, weighing: Weighing, references: Matrix) -> Vector:  # noqa: ARG002
        """Return the mean (c,) of the n - 4f picked values of each column nearest its median."""
        ranked = np.sort(block[weighing.factors > 0], axis=0)
        near = len(block) - 4 * self.adversaries
        low, high = ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]
        # The values nearest to the median are neighbours in the sorted column: find the first.
        middle = low + (high - low) / 2
        runs = len(ranked) - near + 1
        reach = [np.maximum(middle - ranked[i], ranked[i + near - 1] - middle) for i in range(runs)]
        first = np.argmin(reach, axis=0)
        run = np.take_along_axis(ranked, first + np.arange(near)[:, None], axis=0)
        mean: Vector = run.mean(axis=0)
        return mean
