"""How the gradients of all ranks become one: DDP's overlapped mean, or an exact sum.

The exact sum gives the same weights, bit for bit, on any number of ranks. A global batch is always
cut into the same virtual shards, whoever computes them, and their gradients are always added in
the same binary tree: floating-point sums depend on their order, and convolutions on their batch
size. Every rank adds up its own branch of the tree. What travels is one gradient per rank and
step, as with DDP, but not while the backward pass still runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.data.batch import Batch
from medspark.models.classifier import batch_norms, evaluating
from medspark.shards.plan import share
from medspark.train.config import check_virtual_shards
from medspark.train.world import World

__all__ = ["Gradients", "Overlapped", "Piece", "VirtualShards", "tree_sum"]


@dataclass(frozen=True)
class Piece:
    """Rows of a rank's batch that pass through the network together.

    ``weight`` multiplies their mean loss before the backward pass; ``part`` is their share of the
    global batch.
    """

    number: int
    rows: slice
    weight: float
    part: float

    @property
    def empty(self) -> bool:
        """Whether there is no image in it."""
        return bool(self.rows.start == self.rows.stop)


class Gradients(Protocol):
    """Turns what backward passes leave in ``.grad`` into the gradient of the global batch."""

    model: nn.Module

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return the pieces that this rank's batch is learnt in, one after the other."""

    def begin(self) -> None:
        """Start an update."""

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:
        """Hold while one piece is learnt."""

    def attend(self, image: Tensor) -> None:
        """Take part with a piece that is empty; ``image`` (1, C, H, W) is any that fits."""

    def finish(self) -> None:
        """Leave the gradient of the global batch in ``.grad``."""


class Overlapped:
    """Torch's DDP: one all-reduce per bucket, with the last piece, while its backward pass runs."""

    def __init__(self, model: nn.Module, *, count: int, world: World) -> None:
        self.model = _distributed(model, world)
        self._count = count
        self._world = world

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return the batch in as many parts as asked for."""
        size = len(batch.labels)
        count = max(1, min(self._count, size))
        bounds = [share(size, count, part) for part in range(count)]
        return [
            Piece(
                self._world.rank * count + part,
                slice(start, stop),
                batch.weight * (stop - start) / max(size, 1),
                (stop - start) / batch.global_size,
            )
            for part, (start, stop) in enumerate(bounds)
        ]

    def begin(self) -> None:
        """Nothing to do."""

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Hold the all-reduce back until the last piece."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield

    def attend(self, image: Tensor) -> None:
        """Add zero to every gradient: without a rank's part no all-reduce of the others ends."""
        with evaluating(self.model):  # no statistics move
            self.model(image)  # DDP waits for gradients after a pass forward only
        nothing = [0 * p.sum() for p in self.model.parameters() if p.requires_grad]
        torch.stack(nothing).sum().backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Nothing to do: the last backward pass has waited for the all-reduce."""


class VirtualShards:
    """The exact sum over a fixed number of virtual shards."""

    def __init__(self, model: nn.Module, *, count: int, world: World) -> None:
        """Raises UsageError unless ``count`` is a power of two that the ranks share out evenly."""
        check_virtual_shards(count, world.size)
        self.model = model
        self._count = count
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._before: list[Tensor] = []
        self._passes: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._seeing = count  # virtual shards that have an image in this step

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
        """Note where moving batch-norm statistics leave from in every virtual shard."""
        self._before = [buffer.clone() for buffer in self._moving()]
        self._passes = [count.clone() for count in self._counts()]
        self._taken = []

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Take what the piece leaves in the model, as one vector, out of it."""
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
        """Nothing to do: what travels, travels after the last piece."""

    def finish(self) -> None:
        """Put the sum over the virtual shards of all ranks into the model."""
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

    def _counts(self) -> list[Tensor]:
        """Return batch norm's counts of passes, of which a rank makes more if there are fewer."""
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
    """Return the sum of a power of two of ``values``, added pair by pair in a binary tree."""
    while len(values) > 1:
        values = [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _distributed(model: nn.Module, world: World) -> nn.Module:
    if not world.distributed:
        return model
    # Buffers are not broadcast at every pass: frozen statistics never differ, and moving ones are
    # averaged when somebody looks at them. Torch 2.12 gave the switch another name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    renamed = "forward_sync_buffers" in known
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **switch,
    )
