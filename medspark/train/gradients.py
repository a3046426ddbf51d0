"""Combine the gradients of all ranks: DDP's overlapped mean, or an exact sum.

The exact sum gives the same weights, bit for bit, on any number of ranks. Floating-point sums
depend on their order, and convolutions on their batch size. So a global batch is always cut into
the same virtual shards, and their gradients are always added in the same binary tree. Every rank
adds up its own branch of the tree. Each rank sends one gradient per step, as with DDP, but only
after the backward pass. Ranks of one host have a third way: ``medspark.train.one_host``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.data.batch import Batch
from medspark.models.classifier import batch_norms, evaluating
from medspark.shards.plan import share
from medspark.train.config import check_virtual_shards
from medspark.train.pieces import Piece, even_pieces
from medspark.train.world import World

__all__ = ["Gradients", "Overlapped", "VirtualShards", "tree_sum"]


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


class Overlapped:
    """Torch's DDP: one all-reduce per bucket, overlapped with the last piece's backward pass."""

    def __init__(self, model: nn.Module, *, count: int, world: World) -> None:
        self.model = _distributed(model, world)
        self._count = count
        self._world = world

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return the batch in ``count`` pieces, fewer if it has fewer images."""
        size = max(len(batch.labels), 1)
        return [
            replace(piece, weight=batch.weight * (piece.rows.stop - piece.rows.start) / size)
            for piece in even_pieces(batch, self._count, rank=self._world.rank)
        ]

    def begin(self) -> None:
        """Nothing to do."""

    @contextmanager
    def learning(self, piece: Piece, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Suppress the all-reduce for all pieces but the last."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield

    def attend(self, image: Tensor) -> None:
        """Add zero to every gradient: the other ranks' all-reduce needs a part of every rank."""
        with evaluating(self.model):  # batch-norm statistics stay
            self.model(image)  # DDP waits for gradients only after a forward pass
        zeros = [0 * p.sum() for p in self.model.parameters() if p.requires_grad]
        torch.stack(zeros).sum().backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Nothing to do: the last backward pass waits for the all-reduce."""

    def exposed_seconds(self) -> float:
        """Return the mean over the steps that DDP samples: the first ten, then every 100th."""
        if not isinstance(self.model, DistributedDataParallel):
            return 0.0
        sampled: dict[str, int] = self.model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        communication = sampled.get("avg_backward_comm_time", 0)
        overlapped = sampled.get("avg_backward_compute_comm_overlap_time", 0)
        return max(0.0, (communication - overlapped) / 1e9)


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


def _distributed(model: nn.Module, world: World) -> nn.Module:
    if not world.distributed:
        return model
    # Do not broadcast buffers at every pass: frozen statistics never differ, and moving ones are
    # averaged by Engine.average_buffers. Torch 2.12 renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    renamed = "forward_sync_buffers" in known
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **switch,
    )
