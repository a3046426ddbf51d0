"""Temperature scaling: one temperature that calibrates a network (Guo et al. 2017)."""

from __future__ import annotations

import math

from torch import Tensor

from medspark.attacks.losses import cross_entropy

__all__ = ["best_temperature"]

# The limits matter if all validation images are right: the best temperature would then be 0.
_LOWEST, _HIGHEST, _TURNS = 0.2, 20.0, 60
_GOLDEN = (math.sqrt(5) - 1) / 2


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the divisor of ``logits`` (N, K) that minimises the cross-entropy with ``labels``.

    Dividing keeps the order of the probabilities. The loss is convex in the inverse temperature,
    so a golden-section search over the inverse finds the minimum.
    """
    if len(labels) == 0:
        return 1.0
    logits = logits.double()
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(_TURNS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if _loss(logits * left, labels) < _loss(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels).mean()
