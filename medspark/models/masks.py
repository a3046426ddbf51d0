"""Masks of pruned networks: which weights can be pruned, which are kept, how many are zero.

A mask is a tensor of booleans in the shape of its weight; true means kept. The weights of
convolutions and linear layers can be pruned. Biases and norms cannot (Rakin et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "Masks", "apply_masks", "layer_masks", "layer_scale", "magnitude_masks", "nonzero_masks",
    "prunable", "zero_share",
]  # fmt: skip

Masks = Mapping[str, Tensor]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of ``model`` that can be pruned, by the names of its parameters."""
    names = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in names}


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return masks that keep the largest ``weights`` of all layers together.

    A weight's size is its absolute value relative to its layer's (``layer_scale``). Exactly
    round(``sparsity`` * N) of the N weights are pruned; of equal ones, any.
    """
    flat = torch.cat([(w.detach().abs() / layer_scale(w)).flatten() for w in weights.values()])
    kept = _kept(flat, round(sparsity * len(flat)))
    parts = torch.split(kept, [weight.numel() for weight in weights.values()])
    return {
        name: part.view(weight.shape)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
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

    Exactly round(``sparsity`` * N) of the N weights are pruned: what rounding leaves over in one
    layer, the next one takes.
    """
    masks, seen, gone = {}, 0, 0
    for name, score in scores.items():
        seen += score.numel()
        count = round(sparsity * seen) - gone
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


def _kept(sizes: Tensor, pruned: int) -> Tensor:
    kept = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[torch.topk(sizes, pruned, largest=False).indices] = False
    return kept
