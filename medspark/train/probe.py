"""Measure the inputs of the scaling model: all-reduce time between ranks, and reading speed."""

from __future__ import annotations

import statistics
import time
from itertools import islice
from typing import Any

import torch
from pydantic import Field

from medspark.config import Config
from medspark.data.config import DataConfig
from medspark.data.source import open_source
from medspark.remote import AnyPath
from medspark.train.meter import Recorder
from medspark.train.world import World

__all__ = ["ProbeConfig", "probe"]

_TURNS = 7


class ProbeConfig(Config):
    """The settings of the measurement."""

    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    data: DataConfig = DataConfig()
    batch_size: int = Field(32, ge=1, description="images per step, summed over all processes")
    sizes: tuple[int, ...] = Field(
        (4_096, 262_144, 1_048_576, 4_194_304, 16_777_216), description="all-reduce sizes in bytes"
    )
    batches: int = Field(200, ge=1, description="largest number of batches to read")


def probe(config: ProbeConfig, world: World, journal: Recorder) -> dict[str, Any]:  # noqa: ARG001
    """Return the median seconds of an all-reduce by size, and the slowest rank's images/second."""
    timed = {size: _all_reduce(size, world) for size in config.sizes} if world.size > 1 else {}
    return {
        "processes": world.size,
        "all_reduce": {str(size): seconds for size, seconds in timed.items()},
        "loader_images_per_second": min(world.gather(_reading(config, world))),
    }


def _all_reduce(size: int, world: World) -> float:
    values = torch.ones(size // 4, device=world.device)
    seconds = []
    for _ in range(_TURNS):
        world.barrier()
        begin = time.perf_counter()
        values = world.sum(values) / world.size
        float(values[0])  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _reading(config: ProbeConfig, world: World) -> float:
    reader = open_source(config.shards, config.data).training(
        global_batch=config.batch_size, seed=0, rank=world.rank, world=world.size
    )
    begin = time.perf_counter()
    images = sum(len(batch.labels) for batch in islice(reader.batches(0), config.batches))
    return images / (time.perf_counter() - begin)
