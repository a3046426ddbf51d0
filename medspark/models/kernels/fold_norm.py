"""Fold batch norms into the convolutions before them, for training, evaluation and export.

In eval mode a batch norm is a scale and a shift per channel (Ioffe and Szegedy 2015). Moved into
the convolution's weight and bias, they cost no time.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medspark.models.classifier import evaluating
from medspark.models.conv_norm import conv_norm_pairs

__all__ = ["Pairs", "folded_copy", "scale_of"]

# Pairs of names: a convolution, and the batch norm that it feeds.
Pairs = tuple[tuple[str, str], ...]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def folded_copy(model: M, images: Tensor, *, tolerance: float) -> tuple[M, Pairs] | None:
    """Return a copy of ``model`` with its batch norms folded, and the folded pairs.

    The pairs are found by one pass of ``images`` (B, C, H, W). Returns None if a logit of the copy
    differs by more than ``tolerance`` times the largest logit (or 1, if that is larger). ``model``
    is not changed, and the copy is in the same mode.
    """
    pairs = conv_norm_pairs(model, images)
    copied = copy.deepcopy(model)
    for conv_name, norm_name in pairs:
        _fold_pair(copied, conv_name, norm_name)
    with evaluating(model), evaluating(copied):
        expected, folded = model(images), copied(images)
    error, largest = float((folded - expected).abs().max()), float(expected.abs().max())
    return (copied, pairs) if error <= tolerance * max(1.0, largest) else None


def scale_of(norm: Any) -> Tensor:
    """Return the factor (C,) on each channel of a batch norm in eval mode."""
    scale: Tensor = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else norm.weight * scale


def _fold_pair(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = model.get_submodule(conv_name)
    norm: Any = model.get_submodule(norm_name)
    scale, learns = scale_of(norm), conv.weight.requires_grad
    before = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    shift = -before * scale if norm.bias is None else norm.bias - before * scale
    conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=learns)
    conv.bias = nn.Parameter(shift, requires_grad=learns)
    # timm's BatchNormAct2d also applies the activation.
    activation = getattr(norm, "act", None) or nn.Identity()
    if isinstance(activation, nn.Hardtanh):
        # ReLU6 in place computes a copy and copies it back, which is slower.
        activation.inplace = False
    model.set_submodule(norm_name, activation)
