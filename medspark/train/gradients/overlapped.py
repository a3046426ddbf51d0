"""DDP's mean over the ranks, overlapped with the backward pass: between hosts, and on GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.data.batch import Batch
from medspark.models.classifier import evaluating
from medspark.train.gradients.interface import Piece, even_pieces
from medspark.train.world import World

__all__ = ["Overlapped"]


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
