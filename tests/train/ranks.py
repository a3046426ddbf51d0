"""Run by two processes for test_ddp.py: torchrun starts this file once per rank.

Writes FOLDER/rank-N.json: all-reduces per step and mode, and the losses of short trainings.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_network import build_sample, build_tiny, engine_for, over_sockets
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from medspark.data.batch import Batch
from medspark.shards.plan import EpochPlan
from medspark.train.adversarial import MODES
from medspark.train.config import FitConfig
from medspark.train.engine import Engine
from medspark.train.gradients import one_host, shared_memory
from medspark.train.gradients.one_host import OneHost
from medspark.train.loop import fit
from medspark.train.prune.config import PruneConfig, PruneMethod
from medspark.train.prune.pruner import Pruner
from medspark.train.world import World, join


class Losses:
    """Records the loss of every step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            self.by_step[step] = metrics["loss"]


def batch_for(world: World, *, size: int = 10) -> Batch:
    """Return this rank's slice of the fixed global batch."""
    plan = EpochPlan(size, size, 0, shuffle=False)
    rows = plan.rank_batch(0, world.rank, world.size)
    given = build_sample(size)
    images = (given.images * 255).to(torch.uint8)
    return Batch(
        images[rows],
        given.labels[rows],
        rows,
        plan.weight(0, world.rank, world.size),
        size,
        0,
        0,
    )


def build(
    world: World, mode: str, *, pruned_by: PruneMethod | None = None, **chosen: Any
) -> Engine:
    """Return an engine whose steps have one update."""
    pruner = None if pruned_by is None else Pruner(PruneConfig(method=pruned_by), pruned=False)
    return engine_for(
        build_tiny().eval(),
        world=world,
        mode=mode,
        inner_steps=2,
        replays=1,
        pruner=pruner,
        **chosen,
    )


def all_reduces(world: World, mode: str, **chosen: Any) -> list[int]:
    """Return how often each of three updates all-reduces DDP's only bucket."""
    with over_sockets():
        engine = build(world, mode, **chosen)
    calls = []

    def counting(group, bucket):  # DDP wants annotations evaluated, or none
        calls.append(bucket.index())
        return allreduce_hook(group, bucket)

    engine.gradients.model.register_comm_hook(None, counting)
    return [calls_of_a_step(engine, world, step, calls) for step in range(3)]


def signals(world: World, mode: str, **chosen: Any) -> list[int]:
    """Return how often each of three updates waits for ranks that share memory."""
    engine = build(world, mode, **chosen)
    assert isinstance(engine.gradients, OneHost)
    calls = []

    def counting(values: Tensor, *given: Any, **more: Any) -> None:
        calls.append(values.numel())
        reduce(values, *given, **more)

    reduce = dist.all_reduce
    with mock.patch.object(one_host.dist, "all_reduce", counting):
        return [calls_of_a_step(engine, world, step, calls) for step in range(3)]


def calls_of_a_step(engine: Engine, world: World, step: int, calls: list[int]) -> int:
    """Return how many ``calls`` a step adds."""
    before = len(calls)
    engine.step(batch_for(world), step)
    return len(calls) - before


def way_of_gradients(world: World) -> str:
    """Return the class that adds up gradients over the ranks."""
    return type(build(world, "fused").gradients).__name__


def ways_of_gradients(world: World) -> dict[str, str]:
    """Return which way is taken when the last rank is elsewhere, or memory cannot be shared."""
    last = world.rank == world.size - 1
    elsewhere = mock.patch.object(shared_memory, "_host", return_value=f"host {world.rank}")
    hidden = mock.patch.object(shared_memory, "_mapped", return_value=None)
    other = mock.patch.object(shared_memory, "_mapped", lambda *given: mmap.mmap(-1, given[-1]))
    full = mock.patch.object(os, "posix_fallocate", side_effect=OSError("no space"))
    faults = {
        "elsewhere": elsewhere,
        "hidden": hidden if last else nullcontext(),
        "other memory": other if last else nullcontext(),
        "full": full,
    }
    found = {"one host": way_of_gradients(world)}
    for name, fault in faults.items():
        with fault:
            found[name] = way_of_gradients(world)
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "fused, dual": {"mode": "fused", "dual_bn": True},
    "fused, rsr": {"mode": "fused", "pruned_by": "rsr"},
    "fused, hydra": {"mode": "fused", "pruned_by": "hydra"},
    "fused, accumulated": {"mode": "fused", "accumulate": 2},
    "fused, awp": {"mode": "fused", "awp": 0.05, "awp_after": 0.0},
}
EXACT: dict[str, dict[str, Any]] = {
    "fused_noise": {"mode": "fused_noise"},
    "free": {"mode": "free"},
    "ikl": {"mode": "ikl", "inner_steps": 1},
    "awp": {"mode": "fused_noise", "awp": 0.05, "awp_after": 0.0},
}


def exact(world: World, way: str, path: Path) -> None:
    """Train three steps in elastic exact with moving batch norm and keep the weights."""
    torch.set_num_threads(1)  # as in the ranks: sums are bit-equal for equal threads only
    engine = engine_for(
        build_tiny().eval(), world=world, elastic="exact", batch_size=10, ema=0.5, **EXACT[way]
    )
    for step in range(3):  # each in an epoch of its own
        engine.step(replace(batch_for(world), epoch=step), step)
    engine.average_buffers()
    save_file({k: v.contiguous() for k, v in engine.tensors().items()}, path)


def trained(config: FitConfig, world: World, shards: Path) -> dict[int, float]:
    """Return the loss of every step of a training."""
    losses = Losses()
    fit(config.model_copy(update={"shards": shards}), world, losses)
    return losses.by_step


def main(shards: str, folder: str) -> None:
    """Run everything and write the results."""
    with join(timeout_s=60) as world:
        for way in EXACT:
            exact(world, way, Path(folder, f"exact-{way}-{world.rank}.safetensors"))
        config = FitConfig.model_validate(json.loads(Path(folder, "fit.json").read_text()))
        found = {
            "backend": dist.get_backend(),
            "all_reduces": {n: all_reduces(world, **way) for n, way in VARIANTS.items()},
            "losses": trained(config, world, Path(shards)),
            # The ranks' arrays have different lengths.
            "gathered": [said.tolist() for said in world.gather(np.arange(3 * world.rank + 1))],
        }
        if dist.get_backend() == "gloo":
            found["ways"] = ways_of_gradients(world)
            if found["ways"]["one host"] == "OneHost":
                found["signals"] = {n: signals(world, **way) for n, way in VARIANTS.items()}
            with over_sockets():
                config = config.model_copy(update={"run_dir": Path(folder, "sockets")})
                found["losses over sockets"] = trained(config, world, Path(shards))
        Path(folder, f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
