"""Plan the batches of an epoch: a pure function of (rows, seed, epoch, step), split over ranks.

The global batch of a step does not depend on the number of ranks. So every rank takes the same
number of steps, every row is read exactly once per epoch, and a run that resumes on other machines
reads the same rows as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from medspark.seeding import derive, hash64

Rows = npt.NDArray[np.int64]

_ROUNDS = 6
# Steps whose rows are shuffled at once. Step by step, the shuffle costs as much as copying images.
_AHEAD = 64
# Up to so many bits in each half, the Feistel network is computed once for all values.
_TABLED = 6


def share(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return the (start, stop) of ``part`` if ``total`` items are split evenly into ``parts``."""
    return total * part // parts, total * (part + 1) // parts


def permute(positions: npt.ArrayLike, total: int, key: int) -> Rows:
    """Return where a keyed random permutation of ``range(total)`` sends each of ``positions``.

    The permutation is a Feistel network over the next even number of bits, applied until the value
    is below ``total`` (cycle walking; Black and Rogaway 2002). A table of it is stored for small
    totals only: a federation permutes those of many small clients with the same key.
    """
    half = max(1, (max(total - 1, 1).bit_length() + 1) // 2)
    values = np.asarray(positions, dtype=np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        moved = _table(half, key)[values] if half <= _TABLED else _feistel(values, half, key)
        values = np.where(outside, moved, values)
        outside = values >= np.uint64(total)
    return values.astype(np.int64)


@lru_cache(maxsize=16)
def _table(half: int, key: int) -> npt.NDArray[np.uint64]:
    """Return where the network sends each value of 2 x ``half`` bits."""
    return _feistel(np.arange(1 << 2 * half, dtype=np.uint64), half, key)


def _feistel(values: npt.NDArray[np.uint64], half: int, key: int) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (hash64(derive(key, turn), right) & mask)
    return (left << bits) | right


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch over ``rows`` rows.

    ``global_batch`` is the most rows that all ranks together read in one step. The rows are spread
    evenly over the steps, so batch sizes differ by one at most.
    """

    rows: int
    global_batch: int
    seed: int
    epoch: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch < 1:
            raise ValueError(
                f"an epoch needs rows and a batch, not {self.rows}, {self.global_batch}"
            )

    @property
    def steps(self) -> int:
        """The number of steps, the same on every rank."""
        return -(-self.rows // self.global_batch)

    def batch(self, step: int) -> Rows:
        """Return the row numbers of the global batch of ``step``."""
        return self._rows(np.arange(*share(self.rows, self.steps, step), dtype=np.int64))

    def rank_batch(self, step: int, rank: int, world: int) -> Rows:
        """Return the contiguous slice of the global batch that ``rank`` of ``world`` reads."""
        return self._rows(np.arange(*self._slice(step, rank, world), dtype=np.int64))

    def rank_batches(self, rank: int, world: int, *, start: int = 0) -> Iterator[Rows]:
        """Yield ``rank_batch`` of every step from ``start`` on, faster than single calls."""
        for first in range(start, self.steps, _AHEAD):
            steps = range(first, min(first + _AHEAD, self.steps))
            slices = [np.arange(*self._slice(step, rank, world)) for step in steps]
            rows = self._rows(np.concatenate(slices))
            yield from np.split(rows, np.cumsum([len(part) for part in slices[:-1]]))

    def batch_size(self, step: int) -> int:
        """Return the number of rows in the global batch of ``step``."""
        start, stop = share(self.rows, self.steps, step)
        return stop - start

    def weight(self, step: int, rank: int, world: int) -> float:
        """Return the factor for a rank's mean loss.

        DDP averages gradients over ranks. With this factor the average is the mean over the global
        batch, although the ranks' slices differ by one row.
        """
        size = self.batch_size(step)
        first, last = share(size, world, rank)
        return (last - first) * world / size

    def _slice(self, step: int, rank: int, world: int) -> tuple[int, int]:
        start, stop = share(self.rows, self.steps, step)
        first, last = share(stop - start, world, rank)
        return start + first, start + last

    def _rows(self, positions: Rows) -> Rows:
        if not self.shuffle:
            return positions
        return permute(positions, self.rows, derive(self.seed, "epoch", self.epoch))
