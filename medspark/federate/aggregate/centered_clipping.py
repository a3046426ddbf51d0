"""Centered clipping of buckets of updates (Karimireddy et al. 2021; bucketing: 2022)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from medspark.federate.aggregate.rule import Matrix, Measured, Needs, Rule, Weighing
from medspark.seeding import derive

__all__ = ["CenteredClipping"]


class CenteredClipping(Rule):
    """Start at the previous round's change; move by the mean of the clipped distances to buckets.

    v = v + mean_i (x_i - v) min(1, radius / |x_i - v|), where x_i is the mean of a bucket. The
    reference ``centre`` is the outcome of the previous round. Malicious clients move the outcome by
    at most radius x iterations.
    """

    needs: ClassVar[Needs] = "products"
    references: ClassVar[tuple[str, ...]] = ("centre",)

    radius: float = Field(10.0, gt=0, description="longest step of one bucket (tau)")
    iterations: int = Field(1, ge=1, description="number of steps from the centre")
    bucket: int = Field(2, ge=1, description="updates in a bucket; 1 clips each update")

    def weigh(self, seen: Measured) -> Weighing:
        """Return the factors of the updates and of the centre."""
        buckets = self.buckets(seen.clients, seed=seen.seed, round=seen.round)
        factors = np.zeros(len(seen.clients) + 1)
        factors[-1] = 1.0
        for _ in range(self.iterations):
            away = buckets - factors
            squares = ((away @ seen.products) * away).sum(axis=1)
            lengths = np.sqrt(np.maximum(squares, np.finfo(np.float64).tiny))
            scale = np.minimum(1.0, self.radius / lengths)
            factors = factors + (scale[:, None] * away).mean(axis=0)
        return Weighing(factors[:-1], 1.0, references=factors[-1:])

    def buckets(self, clients: tuple[int, ...], *, seed: int, round: int) -> Matrix:
        """Return the buckets (b, n + 1) of a round as factors of the updates and of the centre."""
        keys = [derive(seed, "bucket", round, client) for client in clients]
        shuffled = np.argsort(keys)
        members = [
            shuffled[start : start + self.bucket] for start in range(0, len(keys), self.bucket)
        ]
        buckets = np.zeros((len(members), len(keys) + 1))
        for row, inside in zip(buckets, members, strict=True):
            row[inside] = 1 / len(inside)
        return buckets
