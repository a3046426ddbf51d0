"""HYDRA: learn which weights to keep (Sehwag et al. 2020).

Every weight gets a score. A pass computes with the weights whose scores are among the largest of
their layer by absolute value; backwards, the choice is taken for the identity (straight-through),
so that a score gets the gradient of its weight times the weight. The weights themselves stay.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.masks import layer_masks, prunable

__all__ = ["SCORE", "add_scores", "first_scores", "refresh", "score_masks"]

# The name of the scores: a parameter of each layer, flat, so that they have no weight decay.
SCORE = "score"


class _Scored(nn.Module):
    weight: Any
    score: nn.Parameter
    mask: Tensor  # 1 for kept weights

    def chosen(self) -> Tensor:
        """Return the weight with zeros where it is not chosen."""
        size = self.score.abs().view(self.weight.shape)
        weight: Tensor = self.weight * (self.mask + (size - size.detach()))
        return weight


class ScoredConv2d(_Scored, nn.Conv2d):
    """A convolution with the chosen weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` (B, C, H, W)."""
        output: Tensor = self._conv_forward(input, self.chosen(), self.bias)
        return output


class ScoredLinear(_Scored, nn.Linear):
    """A linear layer with the chosen weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with ``input`` (B, C)."""
        return F.linear(input, self.chosen(), self.bias)


_SCORED: dict[type[nn.Module], type[_Scored]] = {nn.Conv2d: ScoredConv2d, nn.Linear: ScoredLinear}


def add_scores(model: nn.Module, sparsity: float) -> list[str]:
    """Give every prunable layer of ``model`` scores, in place; return the layers' names.

    Raises TypeError that names a layer whose class computes something of its own.
    """
    names = [name.removesuffix(".weight") for name in prunable(model)]
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) not in _SCORED:
            raise TypeError(f"layer {name} is a {type(layer).__name__}, which takes no scores")
    for name in names:
        layer = model.get_submodule(name)
        layer.__class__ = _SCORED[type(layer)]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        layer.register_parameter(SCORE, nn.Parameter(first_scores(weight).flatten()))
        layer.register_buffer("mask", torch.ones_like(weight))
    refresh(model, sparsity)
    return names


def first_scores(weight: Tensor) -> Tensor:
    """Return the first scores: the weights, scaled to sqrt(6 / inputs) at the largest one."""
    weight = weight.detach()
    largest, inputs = weight.abs().max().clamp_min(1e-12), weight[0].numel()
    scores: Tensor = weight * ((6 / inputs) ** 0.5 / largest)
    return scores


@torch.no_grad()
def refresh(model: nn.Module, sparsity: float) -> None:
    """Choose again by the current scores."""
    layers = _layers(model)
    scores = {name: layer.score.view(layer.weight.shape) for name, layer in layers.items()}
    for name, mask in layer_masks(scores, sparsity).items():
        layers[name].mask.copy_(mask)


def score_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of the current choice, by the names of the weights."""
    return {f"{name}.weight": layer.mask.bool() for name, layer in _layers(model).items()}


def _layers(model: nn.Module) -> dict[str, _Scored]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Scored)}
