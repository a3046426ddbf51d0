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
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medspark.data.batch import Batch
from medspark.train.gradients.interface import Piece, even_pieces
from medspark.train.gradients.shared_memory import map_together
from medspark.train.world import World

__all__ = ["OneHost"]

# Every rank reads the slots of all: beyond so many ranks an all-reduce moves less.
_MOST_RANKS = 4
# Parameters of so many numbers move on arrival: a megabyte. For smaller ones the call costs more.
_LARGE = 2**18


class OneHost:
    """The sum in shared memory. ``found`` builds it where the ranks can have such memory.

    The gradient of a large parameter moves into its slot as soon as the backward pass has it, while
    it lies in the processor's cache, and its own memory is given back. The others follow at the
    end, all at once.
    """

    def __init__(self, model: nn.Module, *, count: int, world: World, memory: mmap.mmap) -> None:
        """``memory`` holds two slots a rank, each as large as the trainable parameters."""
        self.model = model
        self._count = count
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        slots = torch.frombuffer(memory, dtype=torch.float32).view(2, world.size, sum(sizes))
        self._here, self._there = (
            _Half(slots[half], _like(slots[half, world.rank], self._parameters))
            for half in range(2)
        )
        self._arrived = [False] * len(sizes)
        self._signal = torch.zeros(1)
        self._waited, self._exchanges = 0.0, 0
        for number, parameter in enumerate(self._parameters):
            take = partial(self._take, number)
            if parameter.numel() >= _LARGE:
                parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
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
        """Forget the gradients of the update before."""
        self._arrived = [False] * len(self._parameters)

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
        self._take_others()
        began = time.perf_counter()
        dist.all_reduce(self._signal)
        self._waited += time.perf_counter() - began
        self._exchanges += 1
        first, second, *others = self._here.slots
        total = torch.add(first, second, out=self._there.slots[self._world.rank])
        for slot in others:
            total.add_(slot)
        for parameter, gradient in zip(self._parameters, self._there.own, strict=True):
            parameter.grad = gradient
        self._here, self._there = self._there, self._here

    @torch.no_grad()
    def _take_others(self) -> None:
        slots, gradients = [], []
        for own, arrived, parameter in zip(
            self._here.own, self._arrived, self._parameters, strict=True
        ):
            if parameter.grad is not None:
                slots.append(own)
                gradients.append(parameter.grad)
            elif not arrived:
                own.zero_()
        if slots:  # torch refuses empty lists
            torch._foreach_copy_(slots, gradients)

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        own = self._here.own[number]
        (own.add_ if self._arrived[number] else own.copy_)(parameter.grad)
        self._arrived[number] = True
        parameter.grad = None

    def exposed_seconds(self) -> float:
        """Return the mean over all updates."""
        return self._waited / max(self._exchanges, 1)


@dataclass(frozen=True, slots=True)
class _Half:
    """The slots (ranks, N) of every second exchange; ``own`` are the views of this rank's slot."""

    slots: Tensor
    own: list[Tensor]


def _like(slot: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return views of ``slot`` (N,) with the shapes and strides of ``parameters``."""
    parts = torch.split(slot, [p.numel() for p in parameters])
    return [
        part.as_strided(p.shape, p.stride(), part.storage_offset())
        for part, p in zip(parts, parameters, strict=True)
    ]
