"""Narrow a network to the widths of its layers that a model card stores.

Structured pruning removes whole channels. The card of such a network stores the size of every
layer that became smaller, so that it can be built again without the package that pruned it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medspark.models.classifier import BATCH_NORMS

__all__ = ["Widths", "narrow", "widths_of"]

# Output and input channels of layers, by name; a norm has as many of both.
Widths = Mapping[str, tuple[int, int]]


def widths_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the output and input channels of the convolutions, linear layers and batch norms.

    Input channels are those of the whole image, also for a depthwise convolution.
    """
    found = {}
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, nn.Conv2d):
            found[name] = layer.out_channels, layer.in_channels
        elif isinstance(module, nn.Linear):
            found[name] = layer.out_features, layer.in_features
        elif isinstance(module, BATCH_NORMS):
            found[name] = layer.num_features, layer.num_features
    return found


def narrow(model: nn.Module, widths: Widths) -> None:
    """Give the layers of ``model`` the ``widths``, in place; narrowed layers have no weights yet.

    Raises ValueError for a layer that ``model`` does not have, for a width below 1 or above its
    own, and for a convolution in groups that is not depthwise.
    """
    own = widths_of(model)
    for name, (out, taken) in widths.items():
        if name not in own:
            raise ValueError(f"there is no layer {name[:100]}")
        if not (1 <= out <= own[name][0] and 1 <= taken <= own[name][1]):
            raise ValueError(f"{name} cannot have {out} of {own[name]} channels from {taken}")
        _narrow(name, model.get_submodule(name), out, taken)


def _narrow(name: str, layer: Any, out: int, taken: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = out, taken
        shape: tuple[int, ...] = out, taken
    elif isinstance(layer, nn.Conv2d):
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        if layer.groups > 1 and not (depthwise and out == taken):
            raise ValueError(f"{name} is a convolution in groups, which cannot be narrowed")
        layer.groups = out if depthwise else layer.groups
        layer.out_channels, layer.in_channels = out, taken
        shape = out, taken // layer.groups, *layer.kernel_size
    else:
        layer.num_features = out
        shape = (out,)
        layer.running_mean = torch.zeros(out)
        layer.running_var = torch.ones(out)
    layer.weight = nn.Parameter(torch.zeros(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(out))
