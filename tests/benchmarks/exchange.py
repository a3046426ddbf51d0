"""Ranks that exchange gradients against the same processes apart, by turns, a thread each.

    torchrun --nproc_per_node 2 tests/benchmarks/exchange.py NETWORK TURNS OUTPUT

Separate trainings differ by more than the exchange costs, because the machine's speed changes
between them. Here two ranks take turns of a few steps: apart, waiting for each other without
exchanging anything, with DDP over loopback sockets, and with gradients in shared memory.
``OUTPUT`` gets, for every turn, the speed of each way over that of the ranks apart.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from step import EPS, images, network
from timing import Result

from medspark.attacks.threat import ThreatModel
from medspark.data.batch import Batch
from medspark.memory import keep_freed_memory
from medspark.train.config import TrainConfig
from medspark.train.engine import Engine
from medspark.train.gradients.one_host import OneHost
from medspark.train.objective import CrossEntropy
from medspark.train.world import World, join

RANKS, SIDE, BATCH, STEPS, WARM_UP = 2, 64, 32, 4, 3
TURNS = int(os.environ.get("MEDSPARK_BENCH_TURNS", "25"))
_LOGGER = logging.getLogger(__name__)


class Apart(World):
    """A rank that knows of no other."""

    @property
    def distributed(self) -> bool:
        """False: gradients stay where they are."""
        return False


def engine_for(name: str, world: World) -> Engine:
    """Return the engine of a rank."""
    return Engine(
        network(name),
        config=TrainConfig(),
        threat=ThreatModel(eps=EPS),
        objective=CrossEntropy(),
        image_shape=(1, SIDE, SIDE),
        total_steps=10**6,
        seed=0,
        world=world,
    )


def measure(name: str, turns: int) -> dict[str, list[float]]:
    """Return the speeds of this rank's ways over that apart, the mean of all ranks, by turn."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    stored, labels = images(SIDE, BATCH)
    with join() as world:
        ways = {"apart": engine_for(name, Apart(0, 0, 1, world.device))}
        with mock.patch.object(OneHost, "found", return_value=None):
            ways["sockets"] = engine_for(name, world)
        ways["waiting"] = engine_for(name, Apart(0, 0, 1, world.device))
        ways["waiting"].gradients.finish = world.barrier  # type: ignore[method-assign]
        ways["memory"] = engine_for(name, world)
        assert isinstance(ways["memory"].gradients, OneHost)
        rows = np.arange(BATCH) + BATCH * world.rank
        batch = Batch(stored, labels, rows, 1.0, BATCH * world.size, 0, 0)
        for engine in ways.values():
            _seconds(engine, batch, world, WARM_UP)
        found: dict[str, list[float]] = {way: [] for way in ways if way != "apart"}
        for turn in range(turns):
            order = list(ways)[:: 1 if turn % 2 == 0 else -1]
            taken = {way: _seconds(ways[way], batch, world, STEPS) for way in order}
            for way, ratios in found.items():
                ratios.append(taken["apart"] / taken[way])
        return found


def _seconds(engine: Engine, batch: Batch, world: World, steps: int) -> float:
    world.barrier()
    began = time.perf_counter()
    for number in range(steps):
        engine.step(batch, number)
    return statistics.fmean(world.gather(time.perf_counter() - began))


def exchange(name: str) -> Result:
    """Return the share of their speed that two ranks keep when they exchange gradients."""
    with tempfile.TemporaryDirectory(prefix="medspark-bench-") as scratch:
        output = Path(scratch, "found.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(RANKS), __file__, name, str(TURNS), str(output)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads(output.read_text())
    for way in ("waiting", "sockets"):
        _LOGGER.info("%s: %.3f", way, statistics.median(found[way]))
    return Result(tuple(found["memory"]), goal=0.95, higher_is_better=True)


BENCHMARKS: dict[str, Callable[[], Result]] = {
    f"exchange/{name}": partial(exchange, name) for name in ("mobilenetv2_100", "resnet50")
}

if __name__ == "__main__":
    measured = measure(sys.argv[1], int(sys.argv[2]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_text(json.dumps(measured))
