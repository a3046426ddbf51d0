"""The rank of this process, and communication between the ranks of a run."""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from medspark.errors import UsageError

__all__ = ["World", "join"]


@dataclass(frozen=True)
class World:
    """One rank of a run. A single process is rank 0 of 1 and has no process group."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there is a process group."""
        return dist.is_initialized()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.distributed:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over the ranks, on every rank."""
        if self.distributed:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, in rank order, on every rank: a number or an array.

        Values are sent in NumPy's file format. Torch's ``all_gather_object`` unpickles, which would
        run any code that reaches a rank. Raises ValueError for other kinds of value.
        """
        if not self.distributed:
            return [value]
        mine = torch.frombuffer(_written(value), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)], device=self.device))
        longest = max(int(length) for length in lengths)
        gathered = [mine.new_zeros(longest) for _ in range(self.size)]
        dist.all_gather(gathered, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [_read(written) for written in gathered]


def _written(value: Any) -> bytearray:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value), allow_pickle=False)
    return bytearray(buffer.getvalue())


def _read(written: Tensor) -> Any:
    array = np.load(io.BytesIO(written.cpu().numpy().tobytes()), allow_pickle=False)
    return array if array.ndim else array.item()


@contextmanager
def join(
    *, timeout_s: float = 120.0, alone: bool = False, store: Store | None = None
) -> Iterator[World]:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK describe; leave it at the end.

    With ``alone``, a single process joins no group even if the environment describes one. The
    processes find each other through ``store``. Without it they use torchrun's store at
    MASTER_ADDR and MASTER_PORT, which listens on all interfaces.

    The backend is gloo between CPUs and nccl between GPUs. ``timeout_s`` bounds every collective,
    so that a stopped rank ends the run instead of hanging it (torch's default is 30 minutes).
    Raises UsageError if a machine with GPUs has fewer GPUs than processes.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world = World(rank, local_rank, size, _device(local_rank))
    if size == 1 and (alone or (store is None and "MASTER_ADDR" not in os.environ)):
        yield world
        return
    on_gpu = world.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        store=store,
        rank=rank,
        world_size=size,
        device_id=world.device if on_gpu else None,  # otherwise a barrier guesses the device
    )
    try:
        yield world
        # A rank that leaves early would reset the connections of ranks that are still busy.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    ranks = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if ranks > gpus:
        raise UsageError(
            f"{ranks} processes cannot share {gpus} GPU(s) of this machine: start at most one per "
            "GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES=."
        )
    # Deterministic: a resumed run gives the same bits. No TF32: its rounding in float32
    # convolutions would disturb folding and attacks, and the checks of both.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
