"""The size of a network: its weights, and the multiply-adds of one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.classifier import evaluating

__all__ = ["multiply_adds"]


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of convolutions and linear layers for one ``image`` (1, C, H, W).

    Zeros count as well: without kernels for sparse weights they take as long as others.
    """
    total = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else output[..., 0].numel()
        total += positions * layer.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return total
