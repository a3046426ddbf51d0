"""Measure norms and inner products of all updates, one coordinate chunk at a time.

Chunks have a fixed length and are added in the order of their coordinates, clients are in the order
of their numbers: a floating-point sum has the same bits on the same kind of processor then, however
many machines measured, and at no cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medspark.federate.aggregate.rule import Matrix, Needs, Vector

__all__ = ["CHUNK", "Part", "chunks", "measure", "total"]

# Coordinates that are looked at together: 100 clients' are 50 MB.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Part:
    """What one chunk adds to ``squares`` (n,) and ``products`` (m, m); empty if not needed."""

    squares: Vector
    products: Matrix


def chunks(length: int) -> Iterator[slice]:
    """Yield the chunks of ``length`` coordinates in order."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))


def measure(block: Matrix, references: Matrix, needs: Needs) -> Part:
    """Return what the updates (n, c) and reference vectors (r, c) of one chunk add."""
    if needs == "nothing":
        return Part(np.empty(0), np.empty((0, 0)))
    squares = np.square(block).sum(axis=1)
    if needs == "norms":
        return Part(squares, np.empty((0, 0)))
    rows = np.concatenate([block, references])
    return Part(squares, rows @ rows.T)


def total(parts: list[Part]) -> Part:
    """Return the sum of all chunks' parts, which are given in the order of their coordinates."""
    squares, products = parts[0].squares.copy(), parts[0].products.copy()
    for part in parts[1:]:
        squares += part.squares
        products += part.products
    return Part(squares, products)
