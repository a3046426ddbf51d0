"""Sum weighted vectors exactly: the order and the grouping of the terms change no bit.

Floating-point sums depend on their order. This module rounds every term once, to a multiple of a
power of two that the round's total weight fixes, and adds it as a 64-bit integer, which is exact.
So tasks may each add up any clients in any order, and merge their sums: the bits are the same.

It costs eight bytes a weight instead of four, and an error of at most n x 2**-50 in the mean of n
clients, far below the rounding of float32 weights (at .01: 2**-31). No number may be larger than
``LARGEST``: a client whose update holds one is left out (``fault``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST", "ExactSum", "check", "fault", "squared_norm", "weighted_sum"]

# A network whose weight moves further than this in one round has diverged.
LARGEST = 2.0**12

# Terms are cut so that what is computed between two of them stays in the processor's cache.
_PIECE = 1 << 15

# BLAS uses one thread for so few numbers, so their sum of squares has the same bits every time.
_RUN = 1 << 13

# 1.5 x 2**52, and the size of numbers that can be rounded by adding it.
_ROUNDING, _SMALL = np.float64(1.5 * 2.0**52), 2.0**51

Vector = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]


def fault(update: Floats) -> str | None:
    """Return why no rule can use the update (d,), or None if it is fine."""
    if not len(update):
        return None
    largest = float(np.maximum(update.max(), -update.min()))  # NaN if any number is
    if largest <= LARGEST:
        return None
    if not np.isfinite(largest):
        return "the update holds numbers that are not finite"
    return f"the update moves a weight by more than {LARGEST:g}"


def check(trained: Floats, weights: Floats) -> tuple[str | None, float]:
    """Return the fault of the update ``trained`` - ``weights`` (d,) and its squared norm.

    The update is not stored. Pieces are added in order, so the norm has the same bits every time.
    """
    square = 0.0
    for here in _pieces(len(weights)):
        change = np.subtract(trained[here], weights[here], dtype=np.float64)
        reason, more = _looked_at(change)
        if reason is not None:
            return reason, math.nan
        square += more
    return None, square


class ExactSum:
    """The running sum of weight x vector; weights may have any sign."""

    def __init__(self, length: int, *, weight: float) -> None:
        """Make a sum of zero.

        ``weight`` is the largest possible sum of the weights' absolute values. Only sums with the
        same ``weight`` can be merged.
        """
        self._exponent = 62 - math.frexp(weight * LARGEST)[1]
        self.units = np.zeros(length, dtype=np.int64)

    def add(self, vector: Floats, weight: float) -> Self:
        """Add ``weight`` times ``vector`` (d,), of numbers not above ``LARGEST`` in size."""
        scale = math.ldexp(weight, self._exponent)
        for here in _pieces(len(vector)):
            self._add(np.multiply(vector[here], scale, dtype=np.float64), here)
        return self

    def add_changes(
        self, trained: Sequence[Floats], weights: Floats, factors: Sequence[float]
    ) -> list[tuple[str | None, float]]:
        """Add the updates ``trained`` - ``weights`` (d,), each times its factor.

        Returns the ``check`` of each; one with a fault is not added. No update is stored. Several
        at once cost less: the sum is read and written once for all of them.
        """
        scales = [math.ldexp(factor, self._exponent) for factor in factors]
        squares, faults = [0.0] * len(trained), dict[int, str]()
        for here in _pieces(len(weights)):
            base = weights[here].astype(np.float64)
            for number, (vector, scale) in enumerate(zip(trained, scales, strict=True)):
                if number in faults:
                    continue
                change = vector[here] - base
                reason, square = _looked_at(change)
                if reason is None:
                    squares[number] += square
                    self._add(np.multiply(change, scale, out=change), here, square * scale**2)
                    continue
                faults[number] = reason
                # Taking away what was added is exact as well.
                before = slice(0, here.start)
                self.add_changes([vector[before]], weights[before], [-factors[number]])
        return [
            (faults.get(number), math.nan if number in faults else square)
            for number, square in enumerate(squares)
        ]

    def _add(self, term: Vector, here: slice, square: float = math.inf) -> None:
        """Add a piece, rounded to whole units; ``square`` is its squared norm or above.

        The piece is overwritten.
        """
        if square < _SMALL**2:
            # Adding this number rounds to a whole one, which the last bits then hold. That takes
            # one step in place of two.
            term += _ROUNDING
            units = term.view(np.int64)
            units -= _ROUNDING.view(np.int64)
        else:
            units = np.rint(term, out=term).astype(np.int64)
        self.units[here] += units

    def merge(self, other: ExactSum) -> Self:
        """Add the sum of ``other``. Raises ValueError if it was made with another total weight."""
        if other._exponent != self._exponent:
            raise ValueError("sums of different total weights have different units")
        self.units += other.units
        return self

    def value(self) -> Vector:
        """Return the sum (d,)."""
        # A power of two rounds nothing, and np.ldexp takes three times as long.
        total = self.units.astype(np.float64)
        total *= math.ldexp(1.0, -self._exponent)
        return total


def weighted_sum(rows: Floats, weights: Vector) -> Vector:
    """Return the sum (c,) of the rows (n, c), each times its weight, whatever their order."""
    total = ExactSum(rows.shape[1], weight=math.fsum(abs(weights)) or 1.0)
    for row, weight in zip(rows, weights, strict=True):
        if weight != 0:
            total.add(row, float(weight))
    return total.value()


def _pieces(length: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, length, _PIECE))


def squared_norm(vector: Vector) -> float:
    """Return the sum of the squares of ``vector`` (d,), without storing them."""
    runs = (vector[start : start + _RUN] for start in range(0, len(vector), _RUN))
    return sum((float(np.dot(run, run)) for run in runs), 0.0)


def _looked_at(change: Vector) -> tuple[str | None, float]:
    square = squared_norm(change)
    # A small norm has no large and no missing numbers in it.
    return (None if square <= LARGEST**2 else fault(change)), square
