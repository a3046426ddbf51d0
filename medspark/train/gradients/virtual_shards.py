"""An exact sum: the same weights, bit for bit, on any number of ranks.

Floating-point sums depend on their order, and convolutions on their batch size. So a global batch
is always cut into the same virtual shards, and their gradients are always added in the same binary
tree. Every rank adds up its own branch of the tree. Each rank sends one gradient per step, as with
DDP, but only after the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medspark.data.batch import Batch
from medspark.models.classifier import batch_norms
from medspark.shards.plan import share
from medspark.train.config import check_virtual_shards
from medspark.train.gradients.interface import Piece
from medspark.train.world import World

__all__ = ["VirtualShards", "tree_sum"]


class VirtualShards:
    """The exact sum over a fixed number of virtual shards."""

    def __init__(self, model: nn.Module, *, count: int, world: World) -> None:
        """Raises UsageError unless ``count`` is a power of two and a multiple of the ranks."""
        check_virtual_shards(count, world.size)
        self.model = model
        self._count = count
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._before: list[Tensor] = []
        self._passes: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._seeing = count  # virtual shards with an image in this step

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return this rank's virtual shards."""
        self._seeing = min(self._count, batch.global_size)
        first, last = share(self._count, self._world.size, self._world.rank)
        offset, _ = share(batch.global_size, self._count, first)
        pieces = []
        for number in range(first, last):
            start, stop = share(batch.global_size, self._count, number)
            part = (stop - start) / batch.global_size
            pieces.append(Piece(number, slice(start - offset, stop - offset), part, part))
        return pieces

    def begin(self) -> None:
        """Save the moving batch-norm statistics; every virtual shard starts from them."""
        self._before = [buffer.clone() for buffer in self._moving()]
        self._passes = [count.clone() for count in self._counts()]
        self._taken = []

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Move the piece's gradients and batch-norm statistics out of the model, as one vector."""
        yield
        moving = self._moving()
        parts = [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in self._parameters
        ]
        seen = 0.0 if piece.empty else 1.0
        parts += [seen * buffer.flatten() / self._seeing for buffer in moving]
        for parameter in self._parameters:
            parameter.grad = None
        for buffer, value in zip(moving, self._before, strict=True):
            buffer.copy_(value)
        self._taken.append(torch.cat(parts))

    def attend(self, image: Tensor) -> None:
        """Nothing to do: ranks exchange gradients in ``finish`` only."""

    def finish(self) -> None:
        """Write the sum over the virtual shards of all ranks into the model."""
        branch = tree_sum(self._taken)
        if self._world.distributed:
            branches = [torch.empty_like(branch) for _ in range(self._world.size)]
            dist.all_gather(branches, branch)
            branch = tree_sum(branches)
        moving = self._moving()
        targets = [*self._parameters, *moving]
        values = torch.split(branch, [target.numel() for target in targets])
        count = len(self._parameters)
        for parameter, value in zip(self._parameters, values[:count], strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(value.view(parameter.shape))
        for buffer, value in zip(moving, values[count:], strict=True):
            buffer.copy_(value.view_as(buffer))
        for tracked, passes in zip(self._counts(), self._passes, strict=True):
            tracked.copy_(passes + 1)

    def exposed_seconds(self) -> float:
        """Return 0: it is not measured."""
        return 0.0

    def _counts(self) -> list[Tensor]:
        """Return batch norm's counters of passes, which depend on the number of ranks."""
        return [
            buffer
            for layer in batch_norms(self.model)
            for buffer in layer.buffers()
            if not buffer.is_floating_point()
        ]

    def _moving(self) -> list[Tensor]:
        return [
            buffer
            for layer in batch_norms(self.model)
            if layer.training
            for buffer in layer.buffers()
            if buffer.is_floating_point()
        ]


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``values``, added pair by pair in a binary tree.

    The number of ``values`` must be a power of two.
    """
    while len(values) > 1:
        values = [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]
