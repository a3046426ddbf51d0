"""Find which convolution of a network feeds which batch norm, by observing a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.classifier import batch_norms, evaluating

__all__ = ["conv_norm_pairs"]


def conv_norm_pairs(model: nn.Module, images: Tensor) -> tuple[tuple[str, str], ...]:
    """Return pairs of names: a convolution, and the batch norm that it feeds.

    ``images`` (B, C, H, W) pass through ``model`` once, in eval mode and without gradients.
    """
    norms = set(batch_norms(model))
    made_by: dict[int, str] = {}
    alive: list[Tensor] = []  # keeps outputs alive, because ids are reused after deletion
    pairs: list[tuple[str, str]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def made(_: nn.Module, __: Any, output: Tensor) -> None:
            made_by[id(output)] = name
            alive.append(output)

        def taken(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            conv = made_by.pop(id(inputs[0]), None)
            if conv is not None:
                pairs.append((conv, name))

        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(made))
        elif module in norms:
            handles.append(module.register_forward_pre_hook(taken))

    for name, module in model.named_modules():
        watch(name, module)
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(pairs)
