"""SFAT: clients whose adversarial loss is small count more (Zhu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medspark.federate.aggregate.rule import Vector

__all__ = ["slack_counts"]


def slack_counts(
    counts: Sequence[float], losses: Sequence[float], *, slack: float = 1 / 6, enhanced: int = 1
) -> Vector:
    """Return what to weigh clients by in place of their images; the sum of all stays the same.

    The ``enhanced`` clients of the smallest adversarial loss count (1 + slack) / (1 - slack) times
    as much as before, 1.4 by default. Ties go to the first.
    """
    favour = np.ones(len(counts))
    favour[np.argsort(losses, kind="stable")[:enhanced]] = (1 + slack) / (1 - slack)
    weighed = np.asarray(counts, dtype=np.float64) * favour
    scaled: Vector = weighed * (sum(counts) / weighed.sum())
    return scaled
