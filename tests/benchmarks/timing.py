"""Ratios of times: both sides measured by turns in one run, so that noise falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """A ratio, or a share, against its goal; ``samples`` are one per turn."""

    samples: tuple[float, ...]
    goal: float
    higher_is_better: bool

    def row(self, name: str, *, command: str) -> dict[str, Any]:
        """Return the row of build/bench.json: the median, and the quartiles as low and high."""
        ratio = statistics.median(self.samples)
        ordered = sorted(self.samples)
        low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        return {
            "name": name,
            "ratio": ratio,
            "low": low,
            "high": high,
            "goal": self.goal,
            "higher_is_better": self.higher_is_better,
            "reached": ratio >= self.goal if self.higher_is_better else ratio <= self.goal,
            "command": command,
        }


def by_turns(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    turns: int = 7,
    warm_up: int = 1,
) -> tuple[float, ...]:
    """Return our time over theirs for each of ``turns``; which goes first alternates."""
    for _ in range(warm_up):
        ours()
        theirs()
    ratios = []
    for turn in range(turns):
        order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        first, second = _seconds(order[0]), _seconds(order[1])
        ratios.append(first / second if turn % 2 == 0 else second / first)
    return tuple(ratios)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
