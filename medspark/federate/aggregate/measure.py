"""Measure norms and inner products of all updates, one coordinate chunk at a time.

Chunks have a fixed length and are added in the order of their coordinates. Clients are in the order
of their numbers. So the floating-point sums have the same bits for any number of machines with the
same kind of processor, at no cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Needs, Vector

__all__ = ["CHUNK", "Part", "chunks", "measure", "total"]

# Coordinates in a chunk; a chunk of 100 clients takes 50 MB.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Part:
    """The terms of one chunk in ``squares`` (n,) and ``products`` (m, m); empty if not needed."""

    squares: Vector
    products: Matrix


def chunks(length: int) -> Iterator[slice]:
    """Yield the chunks of ``length`` coordinates in order."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))


def measure(block: Matrix, references: Matrix, needs: Needs) -> Part:
    """Return the terms of one chunk: of updates (n, c) and reference vectors (r, c)."""
    if needs == "nothing":
        return Part(np.empty(0), np.empty((0, 0)))
    squares = np.square(block).sum(axis=1)
    if needs == "norms":
        return Part(squares, np.empty((0, 0)))
    rows = np.concatenate([block, references])
    return Part(squares, rows @ rows.T)


def total(parts: list[Part]) -> Part:
    """Return the sum of ``parts``, the parts of all chunks in the order of their coordinates."""
    squares, products = parts[0].squares.copy(), parts[0].products.copy()
    for part in parts[1:]:
        squares += part.squares
        products += part.products
    return Part(squares, products)
