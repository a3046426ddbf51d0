"""A training step with other thresholds of the kernels ÷ one with this processor's, by turns.

    python tests/benchmarks/thresholds.py --networks densenet121 unfolding=1024 pointwise=64

Below 1 the other value is faster here; medspark/models/kernels/processor.py keeps the values of
each class of processors. Without values, each threshold is tried lower, higher and out of reach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import step
from timing import by_turns, in_a_process

from medspark.models.kernels import processor

NEVER = 10**9


def alternatives() -> list[str]:
    """Return other values of each threshold."""
    now = processor.thresholds()
    return [
        f"{field.name}={value}"
        for field in fields(now)
        for value in (getattr(now, field.name) // 4, 4 * getattr(now, field.name), NEVER)
    ]


def with_thresholds(values: Iterable[str], name: str, side: int) -> Callable[[], object]:
    """Return our step in this process, with thresholds such as ``pointwise=64``."""
    changes = {key: int(value) for key, _, value in (text.partition("=") for text in values)}
    kind = processor.processor()
    processor._THRESHOLDS[kind] = replace(processor.thresholds(), **changes)
    return step._prepared(step.as_a_rank, name, side)


def main() -> None:
    """Print a row for every network, size and value."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("values", nargs="*", help="such as pointwise=64; a+b changes two together")
    parser.add_argument("--networks", default=",".join(step.NETWORKS))
    parser.add_argument("--sides", default="64")
    parser.add_argument("--turns", type=int, default=step.TURNS)
    asked = parser.parse_args()
    print(processor.processor(), processor.thresholds(), flush=True)
    for name in asked.networks.split(","):
        for side in map(int, asked.sides.split(",")):
            for value in asked.values or alternatives():
                other = partial(with_thresholds, value.split("+"), name, side)
                usual = partial(with_thresholds, (), name, side)
                with in_a_process(other) as theirs, in_a_process(usual) as ours:
                    ratios = sorted(by_turns(theirs, ours, turns=asked.turns, warm_up=2))
                middle, low, high = statistics.median(ratios), ratios[0], ratios[-1]
                print(f"{name:16} {side:4} {value:24} {middle:.3f} [{low:.3f}, {high:.3f}]")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
