"""Add up the gradients of ranks that run on one host, in memory that all of them map.

Over loopback sockets an all-reduce copies every gradient through the kernel, on cores that the
backward pass needs. Here each rank writes its gradient into a slot of shared memory, waits for the
others with an all-reduce of one number, and adds up all slots in the order of the ranks.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medspark.data.batch import Batch
from medspark.train.pieces import Piece, even_pieces
from medspark.train.shared_memory import map_together
from medspark.train.world import World

__all__ = ["OneHost"]

# Every rank reads the slots of all: beyond so many ranks an all-reduce moves less.
_MOST_RANKS = 4


class OneHost:
    """The sum in shared memory. ``found`` builds it where the ranks can have such memory."""

    def __init__(self, model: nn.Module, *, count: int, world: World, memory: mmap.mmap) -> None:
        """``memory`` holds two slots a rank, each as large as the trainable parameters."""
        self.model = model
        self._count = count
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        slots = torch.frombuffer(memory, dtype=torch.float32).view(2, world.size, sum(sizes))
        self._halves = [
            _Half(slots[half], _like(slots[half, world.rank], self._parameters))
            for half in range(2)
        ]
        self._signal = torch.zeros(1)
        self._waited, self._exchanges = 0.0, 0
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)  # as DDP does

    @classmethod
    def found(cls, model: nn.Module, *, count: int, world: World) -> OneHost | None:
        """Return the sum for ``model``, or None, on every rank, if it must be left to DDP."""
        learnt = [p for p in model.parameters() if p.requires_grad]
        if not 2 <= world.size <= _MOST_RANKS or world.device.type != "cpu":
            return None
        if not world.distributed or {p.dtype for p in learnt} != {torch.float32}:
            return None
        size = 2 * world.size * sum(p.numel() for p in learnt) * torch.float32.itemsize
        memory = map_together(world, size)
        if memory is None:
            return None
        return cls(model, count=count, world=world, memory=memory)

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return the batch in ``count`` pieces, weighted for a sum over the ranks."""
        return even_pieces(batch, self._count, rank=self._world.rank)

    def begin(self) -> None:
        """Nothing to do."""

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Nothing to do: gradients add up in ``.grad``."""
        yield

    def attend(self, image: Tensor) -> None:
        """Nothing to do: ranks exchange gradients in ``finish`` only."""

    def finish(self) -> None:
        """Leave the sum over the ranks in ``.grad``, in this rank's slot of the other half.

        Nobody reads that slot any more: every rank that has come to this exchange has ended the
        one before.
        """
        here, there = self._halves
        self._halves.reverse()
        here.write([p.grad for p in self._parameters])
        began = time.perf_counter()
        dist.all_reduce(self._signal)
        self._waited += time.perf_counter() - began
        self._exchanges += 1
        own = there.slots[self._world.rank]
        torch.add(here.slots[0], here.slots[1], out=own)
        for slot in here.slots[2:]:
            own.add_(slot)
        for parameter, gradient in zip(self._parameters, there.own, strict=True):
            parameter.grad = gradient

    def exposed_seconds(self) -> float:
        """Return the mean over all updates."""
        return self._waited / max(self._exchanges, 1)


@dataclass(frozen=True, slots=True)
class _Half:
    """The slots (ranks, N) of every second exchange; ``own`` are the views of this rank's slot."""

    slots: Tensor
    own: list[Tensor]

    @torch.no_grad()
    def write(self, gradients: list[Tensor | None]) -> None:
        """Write ``gradients`` into this rank's slot; one that is missing is zero."""
        given = [(o, g) for o, g in zip(self.own, gradients, strict=True) if g is not None]
        if given:  # torch refuses empty lists
            torch._foreach_copy_([own for own, _ in given], [gradient for _, gradient in given])
        for own, gradient in zip(self.own, gradients, strict=True):
            if gradient is None:
                own.zero_()


def _like(slot: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return views of ``slot`` (N,) with the shapes and strides of ``parameters``."""
    parts = torch.split(slot, [p.numel() for p in parameters])
    return [
        part.as_strided(p.shape, p.stride(), part.storage_offset())
        for part, p in zip(parts, parameters, strict=True)
    ]
