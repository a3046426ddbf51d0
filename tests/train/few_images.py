"""Run by four processes for test_few_images.py, with three images per step.

Writes to FOLDER, for every rank: the gradient of a step by mode, the batch-norm statistics of
three steps, the tensors of elastic exact; and the losses of a training in which all ranks stop at
one step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ranks
import tiny_network
import torch
from safetensors.torch import save_file
from tiny_network import build_tiny
from torch import Tensor

from medspark.train.adversarial import MODES
from medspark.train.config import DistillConfig, FitConfig
from medspark.train.distill import distillation_rule
from medspark.train.engine import Engine
from medspark.train.loop import fit
from medspark.train.world import World, join

IMAGES = 3
METHODS = ("kd", "defensive", "ard", "rslad")
WAYS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    **{method: {"method": method} for method in METHODS},
    "fused, accumulated": {"mode": "fused", "accumulate": 2},
    "fused, aligned": {"mode": "fused", "gradalign": 0.2},
}


class StopError(Exception):
    """Simulates a lost machine."""


class Losses(ranks.Losses):
    """Records the loss of every step; may end the process at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self._stop_at = stop_at

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        super().record(step, metrics)
        if step == self._stop_at and "loss" in metrics:
            raise StopError


def engine_for(
    world: World, *, frozen: bool = False, method: str | None = None, **chosen: Any
) -> Engine:
    """Return an engine for the tiny network; with a method, another network teaches it."""
    network, rule = build_tiny().eval(), None
    network.batch_norm_frozen = frozen
    if method is not None:
        teacher = build_tiny(seed=1).eval()
        config = DistillConfig.model_validate({"teacher": "unused", "method": method})
        rule = distillation_rule(config, teacher)
    chosen = {"inner_steps": 2} | chosen
    return tiny_network.engine_for(network, world=world, step_rule=rule, **chosen)


def gradient(world: World, **chosen: Any) -> dict[str, Tensor]:
    """Return the gradients of the first update from three images, by parameter."""
    engine, kept = engine_for(world, **{"frozen": True} | chosen), {}

    def keep(*_: object) -> None:
        for name, parameter in engine.model.named_parameters():
            kept.setdefault(name, parameter.grad.clone())

    engine.optimiser.register_step_pre_hook(keep)
    engine.step(ranks.batch_for(world, size=IMAGES), 0)
    return kept


def statistics(world: World, **chosen: Any) -> dict[str, Tensor]:
    """Return the batch-norm statistics after three steps: of each rank, and the kept ones."""
    engine = engine_for(world, mode="fused", **chosen)
    for step in range(3):
        engine.step(ranks.batch_for(world, size=IMAGES), step)
    own = moving(engine)
    engine.average_buffers()
    once = moving(engine)
    engine.average_buffers()
    twice = moving(engine)
    parts = {"own": own, "once": once, "twice": twice}
    return {f"{part}/{name}": value for part, all_ in parts.items() for name, value in all_.items()}


def moving(engine: Engine) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in engine.model.named_buffers() if "running" in name}


def exact(world: World, shards: int) -> dict[str, Tensor]:
    """Return all tensors after three steps of elastic exact with moving batch norm."""
    torch.set_num_threads(1)
    engine = engine_for(world, mode="fused_noise", elastic="exact", virtual_shards=shards)
    for step in range(3):
        engine.step(ranks.batch_for(world, size=IMAGES), step)
    engine.average_buffers()
    return engine.tensors()


def by_ddp(
    result: Callable[..., dict[str, Tensor]], world: World, **chosen: Any
) -> dict[str, Tensor]:
    """Return a result of ranks whose gradients DDP adds up."""
    with tiny_network.over_sockets():
        return result(world, **chosen)


RESULTS: dict[str, Callable[[World], dict[str, Tensor]]] = {
    **{
        f"gradient of {name}": lambda world, chosen=chosen: gradient(world, **chosen)
        for name, chosen in WAYS.items()
    },
    **{
        f"gradient of {name} by DDP": lambda world, chosen=chosen: by_ddp(gradient, world, **chosen)
        for name, chosen in WAYS.items()
    },
    "gradient with two norms": lambda world: gradient(
        world, frozen=False, mode="fused", dual_bn=True
    ),
    "statistics": statistics,
    "statistics by DDP": lambda world: by_ddp(statistics, world),
    "exact 4": lambda world: exact(world, 4),
    "exact 8": lambda world: exact(world, 8),
}


def main(folder: str) -> None:
    """Run everything and write the results, or only resume the stopped training."""
    task = json.loads(Path(folder, "task.json").read_text())
    with join(timeout_s=60) as world:
        for name, result in RESULTS.items() if task["results"] else ():
            found = {key: value.contiguous() for key, value in result(world).items()}
            save_file(found, Path(folder, f"{name}, rank {world.rank}.safetensors"))
        losses = Losses(task["stop_at"])
        with suppress(StopError):
            fit(FitConfig.model_validate(task["fit"]), world, losses)
        Path(folder, f"losses-{world.size}-{world.rank}.json").write_text(
            json.dumps(losses.by_step)
        )


if __name__ == "__main__":
    main(sys.argv[1])
