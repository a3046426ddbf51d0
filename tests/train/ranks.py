"""Run by two processes for test_ddp.py: torchrun starts this file once per rank.

Writes FOLDER/rank-N.json: all-reduces per step and mode, and the losses of a short training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_network import build_sample, build_tiny, engine_for
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from medspark.data.batch import Batch
from medspark.shards.plan import EpochPlan
from medspark.train.adversarial import MODES
from medspark.train.config import FitConfig, PruneConfig, PruneMethod
from medspark.train.loop import fit
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


def all_reduces(
    world: World, mode: str, *, pruned_by: PruneMethod | None = None, **chosen: Any
) -> list[int]:
    """Return how often each of three updates all-reduces its only bucket."""
    pruner = None if pruned_by is None else Pruner(PruneConfig(method=pruned_by), pruned=False)
    engine = engine_for(
        build_tiny().eval(),
        world=world,
        mode=mode,
        inner_steps=2,
        replays=1,
        pruner=pruner,
        **chosen,
    )
    calls = []

    def counting(group, bucket):  # DDP wants annotations evaluated, or none
        calls.append(bucket.index())
        return allreduce_hook(group, bucket)

    engine.gradients.model.register_comm_hook(None, counting)
    counts = []
    for step in range(3):
        before = len(calls)
        engine.step(batch_for(world), step)
        counts.append(len(calls) - before)
    return counts


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


def main(shards: str, folder: str) -> None:
    """Run everything and write the results."""
    with join(timeout_s=60) as world:
        counts = {mode: all_reduces(world, mode) for mode in MODES}
        counts["fused, dual"] = all_reduces(world, "fused", dual_bn=True)
        for method in ("rsr", "hydra"):
            counts[f"fused, {method}"] = all_reduces(world, "fused", pruned_by=method)
        counts["fused, accumulated"] = all_reduces(world, "fused", accumulate=2)
        counts["fused, awp"] = all_reduces(world, "fused", awp=0.05, awp_after=0.0)
        for way in EXACT:
            exact(world, way, Path(folder, f"exact-{way}-{world.rank}.safetensors"))
        losses = Losses()
        config = FitConfig.model_validate(json.loads(Path(folder, "fit.json").read_text()))
        fit(config.model_copy(update={"shards": Path(shards)}), world, losses)
        found = {
            "backend": dist.get_backend(),
            "all_reduces": counts,
            "losses": losses.by_step,
            # The ranks' arrays have different lengths.
            "gathered": [said.tolist() for said in world.gather(np.arange(3 * world.rank + 1))],
        }
        Path(folder, f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
