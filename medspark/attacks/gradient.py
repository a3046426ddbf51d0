"""The gradient of a loss with respect to the image, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.losses import Loss


def input_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``loss`` at ``images``, and the logits there.

    The model's parameters receive no gradient and its mode is left as it is found. Mixed
    precision is switched off: rounding hides small gradients.
    """
    x = images.detach().requires_grad_(True)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        logits = model(x)
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), x)
    return gradient, logits.detach()


def zero_gradient(gradient: Tensor) -> Tensor:
    """Return for each image (B,) whether its gradient is exactly zero, or not a number.

    Such an image cannot be attacked by following the gradient, robust or not.
    """
    return (gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) == 0).flatten(1).all(1)
