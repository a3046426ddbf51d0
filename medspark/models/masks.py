"""Masks of pruned networks: which weights can be pruned, which are kept, how many are zero.

A mask is a tensor of booleans in the shape of its weight; true means kept. The weights of
convolutions and linear layers can be pruned. Biases and norms cannot (Rakin et al. 2019).

Layers with fewer than 32 inputs to an output stay whole, and the others lose more: depthwise
convolutions above all, which Zhu and Gupta (2017) leave out, too. An output of nine weights is soon
without any. At 85 % MobileNet-V2 lost most channels of its first layers, and gave one answer to all
images after fine-tuning, with fixed and with trained statistics of batch norms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "Masks", "apply_masks", "cut_layers", "layer_masks", "layer_scale", "magnitude_masks",
    "nonzero_masks", "prunable", "wide_layers", "zero_share",
]  # fmt: skip

Masks = Mapping[str, Tensor]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FEWEST_INPUTS = 32
# The other layers give up at most this share of their weights for those that stay whole.
_LARGEST_SHARE = 0.99


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of ``model`` that can be pruned, by the names of its parameters."""
    names = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in names}


def wide_layers(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layers with 32 inputs to an output or more; of all if none has."""
    wide = [name for name, weight in weights.items() if weight[0].numel() >= _FEWEST_INPUTS]
    return wide or list(weights)


def cut_layers(weights: Mapping[str, Tensor], sparsity: float) -> list[str]:
    """Return the names of the layers that lose weights.

    They are the wide ones; all layers if these would lose more than 99 % of their weights.
    """
    wide = wide_layers(weights)
    room = _LARGEST_SHARE * sum(weights[name].numel() for name in wide)
    return wide if _pruned(weights, sparsity) <= room else list(weights)


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return masks that keep the largest ``weights`` of all layers together.

    A weight's size is its absolute value relative to its layer's (``layer_scale``). Exactly
    round(``sparsity`` * N) of the N weights are pruned, in the layers that lose any
    (``cut_layers``); of equal ones, any.
    """
    names = cut_layers(weights, sparsity)
    sizes = [(weights[n].detach().abs() / layer_scale(weights[n])).flatten() for n in names]
    kept = _kept(torch.cat(sizes), _pruned(weights, sparsity)) if names else torch.empty(0)
    parts = dict(zip(names, torch.split(kept, [len(size) for size in sizes]), strict=True))
    return {
        name: parts[name].view(weight.shape) if name in parts else _whole(weight)
        for name, weight in weights.items()
    }


def layer_scale(weight: Tensor) -> Tensor:
    """Return the root mean square of a layer's ``weight``; the least positive number for zeros.

    Layers are compared in this unit. Where a norm is folded into a layer, or only follows it, the
    scale of its weights says nothing: by plain absolute values, MobileNet-V2 lost whole layers.
    """
    size = weight.detach().square().mean().sqrt()
    return size.clamp_min(torch.finfo(weight.dtype).tiny)


def layer_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return masks that keep the largest absolute ``scores`` of each layer, the same share of each.

    Exactly round(``sparsity`` * N) of the N weights are pruned, in the layers that lose any
    (``cut_layers``): what rounding leaves over in one layer, the next one takes.
    """
    masks = {name: _whole(score) for name, score in scores.items()}
    names = cut_layers(scores, sparsity)
    seen, gone, total = 0, 0, sum(scores[name].numel() for name in names)
    for name in names:
        score = scores[name]
        seen += score.numel()
        count = round(_pruned(scores, sparsity) * seen / total) - gone
        gone += count
        masks[name] = _kept(score.detach().abs().flatten(), count).view(score.shape)
    return masks


def nonzero_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of a network that is pruned already: they keep what is not zero."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


@torch.no_grad()
def apply_masks(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Set the ``tensors`` that a mask of the same name prunes to zero, in place."""
    for name, mask in masks.items():
        # Not a product: infinity times zero is not zero.
        tensors[name].masked_fill_(~mask, 0.0)


def zero_share(weights: Mapping[str, Tensor]) -> float:
    """Return the share of ``weights`` that are exactly zero, all layers together."""
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    return zeros / max(sum(weight.numel() for weight in weights.values()), 1)


def _pruned(weights: Mapping[str, Tensor], sparsity: float) -> int:
    return round(sparsity * sum(weight.numel() for weight in weights.values()))


def _whole(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def _kept(sizes: Tensor, pruned: int) -> Tensor:
    kept = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[torch.topk(sizes, pruned, largest=False).indices] = False
    return kept
