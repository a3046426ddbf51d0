"""Split-conformal p-values and thresholds (Vovk et al. 2005; Bates et al. 2023).

Let the scores of n clean validation images and that of a new clean image be exchangeable. Then the
p-value of the new image is at most alpha with a probability of at most alpha.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["needed", "p_values", "share_interval", "threshold"]

Array = npt.NDArray[Any]


def p_values(scores: Array, calibration: Array) -> npt.NDArray[np.float64]:
    """Return (1 + the number of calibration scores at least as high) / (n + 1) for each score.

    ``calibration`` (n,) holds the scores of clean validation images, in any order.
    """
    ordered = np.sort(calibration)
    below = np.searchsorted(ordered, scores, side="left")
    values: npt.NDArray[np.float64] = (1 + len(ordered) - below) / (len(ordered) + 1)
    return values


def threshold(calibration: Array, rate: float) -> float:
    """Return the largest score that is not flagged at the false-positive ``rate``.

    A score is flagged if its p-value is at most ``rate``, which means if it exceeds the threshold.
    With too few calibration scores nothing is flagged: the threshold is infinite.
    """
    # The tolerance undoes the rounding of a product such as 0.05 * 100.
    allowed = math.floor(rate * (len(calibration) + 1) + 1e-9)
    if allowed > len(calibration):
        return -math.inf
    return float(np.sort(calibration)[-allowed]) if allowed else math.inf


def needed(rate: float) -> int:
    """Return how many calibration images a false-positive ``rate`` needs: 19 for 5 %."""
    return math.ceil(1 / rate - 1e-9) - 1


def share_interval(hits: Array, groups: Array, *, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of the share of ``hits`` (N,), after Wilson (1927).

    There are taken to be as many independent images as ``groups`` (patients), since the images of
    one patient are correlated. The interval is not degenerate where the share is 0 or 1.
    """
    count = len(np.unique(groups))
    if count == 0:
        return 0.0, 1.0
    share = float(hits.mean())
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
