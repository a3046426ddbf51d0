"""Learning rate and eps as pure functions of the step, so checkpoints need not hold them."""

from __future__ import annotations

import math

__all__ = ["one_cycle", "ramp"]


def one_cycle(
    step: int, total: int, *, peak: float, rising: float = 0.3, start: float = 25, end: float = 1e4
) -> float:
    """Return the learning rate of ``step`` of ``total`` (Smith and Topin 2018).

    It rises as a cosine from ``peak/start`` to ``peak`` over the ``rising`` share of the steps,
    then falls as a cosine to ``peak/start/end``.
    """
    crest = max(rising * total, 1.0) - 1
    if step <= crest:
        return _cosine(peak / start, peak, step / crest if crest > 0 else 1.0)
    return _cosine(peak, peak / start / end, (step - crest) / max(total - 1 - crest, 1e-9))


def ramp(step: int, total: int, *, share: float) -> float:
    """Return the factor on eps: it rises linearly to 1 over the first ``share`` of the steps."""
    return min(1.0, (step + 1) / (share * total)) if share > 0 else 1.0


def _cosine(first: float, last: float, done: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
