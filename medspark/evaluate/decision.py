"""The operating point of a classifier of two classes: choose it, count there, weigh its benefit.

Scores (N,) are log-odds of the positive class, or anything that rises with them. An image is called
positive if its score is at least the cut. All functions are pure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.config import Config
from medspark.models.card import Criterion, Rate

__all__ = [
    "Counts", "best_cut", "count_at", "design_effect", "net_benefit", "probability", "rates_at",
    "wilson",
]  # fmt: skip

Array = npt.NDArray[Any]

_ROUNDING = 1e-9  # of sums of weights
# Not 0 or 1, so that log-odds stay finite.
_LEAST = 1e-12
_Z95 = 1.959963984540054


class Counts(Config):
    """How many images of each class are called right at a cut."""

    positives: int
    found: int
    negatives: int
    spared: int

    @property
    def sensitivity(self) -> float | None:
        """The share of positives that are found; None without positives."""
        return self.found / self.positives if self.positives else None

    @property
    def specificity(self) -> float | None:
        """The share of negatives that are spared; None without negatives."""
        return self.spared / self.negatives if self.negatives else None


def best_cut(
    scores: Array, positive: Array, *, criterion: Criterion, target: float | None = None
) -> float:
    """Return the cut of ``scores`` (N,) that suits ``criterion`` best.

    ``positive`` (N,) says of each image whether it is positive, or how probably it is. With
    ``sensitivity`` as many images as possible are called negative while at least ``target`` of the
    positives are found; with ``specificity`` it is the other way round. ``youden`` gives the
    largest sum of sensitivity and specificity (Youden 1950), the more sensitive cut if several do.
    The cut lies halfway between two neighbouring scores, so that rounding changes no call, or one
    unit beyond the last. Raises ValueError if a class that the criterion needs is missing.
    """
    cuts, sensitivity, specificity = _every_cut(scores, positive)
    if criterion == "youden":
        wanted = sensitivity + specificity
        chosen = int(np.argmax(wanted >= np.max(wanted) - _ROUNDING))
    else:
        assert target is not None, "the configuration was validated"
        if criterion == "sensitivity":
            chosen = int(np.flatnonzero(sensitivity >= target - _ROUNDING)[-1])
        else:
            chosen = int(np.flatnonzero(specificity >= target - _ROUNDING)[0])
    return float(cuts[chosen])


def _every_cut(scores: Array, positive: Array) -> tuple[Array, Array, Array]:
    """Return every cut that calls images differently, rising, with sensitivity and specificity.

    A class without images has a rate of NaN, which no criterion accepts.
    """
    levels, member = np.unique(scores.astype(np.float64), return_inverse=True)
    weights = positive.astype(np.float64)
    found = np.bincount(member, weights=weights, minlength=len(levels))
    spared = np.bincount(member, weights=1 - weights, minlength=len(levels))
    if not found.sum() > 0 or not spared.sum() > 0:
        raise ValueError("there are images of one class only")
    between = (levels[:-1] + levels[1:]) / 2
    cuts = np.concatenate([[levels[0] - 1], between, [levels[-1] + 1]])
    below = np.concatenate([[0.0], np.cumsum(found)])
    passed = np.concatenate([[0.0], np.cumsum(spared)])
    return cuts, (below[-1] - below) / below[-1], passed / passed[-1]


def count_at(scores: Array, positive: Array, cut: float) -> Counts:
    """Return the counts at ``cut``; ``positive`` is a mask (N,)."""
    called = scores >= cut
    return Counts(
        positives=int(positive.sum()),
        found=int((called & positive).sum()),
        negatives=int((~positive).sum()),
        spared=int((~called & ~positive).sum()),
    )


def rates_at(scores: Array, positive: Array, cut: float, groups: Array) -> tuple[Rate, Rate]:
    """Return sensitivity and specificity at ``cut`` as the model card keeps them.

    ``groups`` (N,) holds the patient of each image, for the design effects.
    """
    called = scores >= cut
    return _rate(called[positive], groups[positive]), _rate(~called[~positive], groups[~positive])


def _rate(right: Array, groups: Array) -> Rate:
    return Rate(
        right=int(right.sum()), images=len(right), design_effect=design_effect(right, groups)
    )


def design_effect(hits: Array, groups: Array) -> float:
    """Return how much larger the variance of the share of ``hits`` (N,) is than a binomial one.

    The images of one patient of ``groups`` (N,) are correlated. Counts divided by the effect can be
    treated as binomial (Rao and Scott 1992). It is at least 1, and 1 without variance.
    """
    share = float(hits.mean()) if len(hits) else 0.0
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1 if len(hits) else 0
    if not 0 < share < 1 or count < 2:
        return 1.0
    excess = np.bincount(member, weights=hits - share)
    clustered = count / (count - 1) * float((excess**2).sum()) / len(hits) ** 2
    return max(1.0, clustered / (share * (1 - share) / (len(hits) - 1)))


def wilson(right: float, images: float, *, z: float = _Z95) -> tuple[float, float]:
    """Return the score interval of a share, 95 % by default (Wilson 1927).

    It keeps its level for few images and shares near 0 and 1 (Brown, Cai and DasGupta 2001).
    ``right`` and ``images`` may be divided by a design effect.
    """
    if images <= 0:
        return 0.0, 1.0
    share, rest = right / images, z * z / images
    middle = (share + rest / 2) / (1 + rest)
    half = z * math.sqrt(share * (1 - share) / images + rest / images / 4) / (1 + rest)
    return max(0.0, middle - half), min(1.0, middle + half)


def probability(scores: Array | float) -> Any:
    """Return the probability of log-odds ``scores``, never exactly 0 or 1."""
    return np.clip(1 / (1 + np.exp(-np.clip(scores, -700, 700))), _LEAST, 1 - _LEAST)


def net_benefit(probabilities: Array, positive: Array, thresholds: Array) -> Array:
    """Return the net benefit (T,) of calling images positive from each of ``thresholds`` (T,) on.

    It is the share of images that are true positives, minus the share that are false positives
    weighted by the odds of the threshold (Vickers and Elkin 2006): who acts from a probability of t
    on accepts (1 - t) / t false alarms for each positive found.
    """
    called = probabilities[None] >= thresholds[:, None]
    true = (called & positive).mean(axis=1)
    false = (called & ~positive).mean(axis=1)
    benefit: Array = true - false * thresholds / (1 - thresholds)
    return benefit
