"""SFAT: give clients with a small adversarial loss more weight (Zhu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medspark.federate.aggregate.rule import Vector

__all__ = ["slack_counts"]


def slack_counts(
    counts: Sequence[float], losses: Sequence[float], *, slack: float = 1 / 6, enhanced: int = 1
) -> Vector:
    """Return the clients' weights, which replace their numbers of images and have the same sum.

    The ``enhanced`` clients with the smallest adversarial loss count (1 + slack) / (1 - slack)
    times as much, 1.4 by default. Ties go to the first.
    """
    favour = np.ones(len(counts))
    favour[np.argsort(losses, kind="stable")[:enhanced]] = (1 + slack) / (1 - slack)
    weighed = np.asarray(counts, dtype=np.float64) * favour
    scaled: Vector = weighed * (sum(counts) / weighed.sum())
    return scaled
