"""The pieces of a rank's batch that pass through the network together."""

from __future__ import annotations

from dataclasses import dataclass

from medspark.data.batch import Batch
from medspark.shards.plan import share

__all__ = ["Piece", "even_pieces"]


@dataclass(frozen=True)
class Piece:
    """Rows of a rank's batch that pass through the network together.

    ``weight`` multiplies the mean loss of these rows before the backward pass. ``part`` is the
    number of these rows divided by the size of the global batch.
    """

    number: int
    rows: slice
    weight: float
    part: float

    @property
    def empty(self) -> bool:
        """Whether the piece has no image."""
        return bool(self.rows.start == self.rows.stop)


def even_pieces(batch: Batch, count: int, *, rank: int) -> list[Piece]:
    """Return ``batch`` in ``count`` pieces, or in fewer if it has fewer images.

    Their weights are for gradients that are added up over pieces and ranks.
    """
    size = len(batch.labels)
    count = max(1, min(count, size))
    pieces = []
    for number in range(count):
        start, stop = share(size, count, number)
        part = (stop - start) / batch.global_size
        pieces.append(Piece(rank * count + number, slice(start, stop), part, part))
    return pieces
