"""Ratios of times: both sides are measured by turns in one run, so that noise affects both."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
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


@contextmanager
def in_a_process(make: Callable[[], Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """Lend the work that ``make`` returns, done in a process of its own.

    What a side sets for its whole process, such as how memory is taken, is then not the other's.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(make, there), daemon=True)
    process.start()
    there.close()

    def work() -> None:
        here.send(None)
        here.recv()

    try:
        yield work
    finally:
        here.close()
        process.join()


def _serve(make: Callable[[], Callable[[], object]], orders: Connection) -> None:
    work = make()
    while True:
        try:
            orders.recv()
        except EOFError:
            return
        work()
        orders.send(None)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
