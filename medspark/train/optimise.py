"""The optimiser: which parameters move how fast, clipping, and the average that is kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from medspark.train.config import TrainConfig

__all__ = ["Average", "adamw", "clip_gradients", "set_rate"]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over ``model`` with one group per learning rate and decay.

    Norms and biases are not decayed. With ``layer_decay`` the rate falls from the head down,
    stage by stage in the order in which the network defines its layers. Each group's ``scale``
    is what ``set_rate`` multiplies the rate by. The fused update reads gradients and moments as
    they lie in memory (torch 2.13): they have to lie like their parameter.
    """
    depths = _depths(name for name, _ in model.named_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = config.layer_decay ** depths[name]
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=config.lr,
        fused=True,
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to ``rate`` times the group's scale."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale the gradients to a norm of at most ``largest`` (0: no limit); return their norm."""
    kept = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
    found = float(norm)
    if 0 < largest < found:
        nn.utils.clip_grads_with_norm_(kept, largest, norm)
    return found


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model``; early on faster, so that the first weights are soon forgotten."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.values.values()), [current[name].detach() for name in self.values], 1 - decay
        )

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on from saved ``values``."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the parameters of ``model``; twice is as if never."""
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Return how many stages below the head each parameter lies; the head is the last one."""
    stages: list[str] = []
    stage_of: dict[str, str] = {}
    for name in names:
        match = re.match(r"(?:.*?\.)?(?:blocks|features|layers|stages)\.[a-z]*(\d+)", name)
        stage = match[0] if match else re.sub(r"\.[^.]*$", "", name)
        stage_of[name] = stage
        if stage not in stages:
            stages.append(stage)
    return {name: len(stages) - 1 - stages.index(stage) for name, stage in stage_of.items()}
