"""The gradient of a loss with respect to the images only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medspark.attacks.losses import Loss

# A network, or any function from images (B, C, H, W) to logits (B, K).
Logits = Callable[[Tensor], Tensor]


def input_gradient(
    model: Logits, images: Tensor, labels: Tensor, *, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``loss`` at ``images`` (B, C, H, W), and the logits (B, K).

    The model's parameters get no gradient, and its mode does not change. Mixed precision is
    switched off, because rounding hides small gradients; a function may switch it on again.
    """
    x = images.detach().requires_grad_(True)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        logits = model(x)
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), x)
    return gradient, logits.detach()


def zero_gradient(gradient: Tensor) -> Tensor:
    """Return for each image (B,) whether its gradient is exactly zero or not finite.

    Gradient attacks cannot move such an image, whether or not the network is robust.
    """
    return (gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) == 0).flatten(1).all(1)
