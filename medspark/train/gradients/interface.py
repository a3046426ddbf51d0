"""The pieces of a rank's batch, and the interface of what combines their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from medspark.data.batch import Batch
from medspark.shards.plan import share

__all__ = ["Gradients", "Piece", "even_pieces"]


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


class Gradients(Protocol):
    """Combines the gradients of pieces in ``.grad`` into the gradient of the global batch."""

    model: nn.Module

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return this rank's batch as the pieces to learn from, in order."""

    def begin(self) -> None:
        """Start an update."""

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:
        """Return the context in which the passes of ``piece`` run."""

    def attend(self, image: Tensor) -> None:
        """Join the collectives for an empty piece; ``image`` (1, C, H, W) is a dummy image."""

    def finish(self) -> None:
        """Leave the gradient of the global batch in ``.grad``."""

    def exposed_seconds(self) -> float:
        """Return the seconds per update that this rank only waited for the others."""
