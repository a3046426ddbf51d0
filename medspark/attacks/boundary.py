"""The decision boundaries near an image, linearised, for DeepFool and FAB."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medspark.attacks.losses import boundaries
from medspark.attacks.threat import Norm, norms

# Largest number of boundaries per image: with many classes only the nearest matter, and each costs
# a backward pass.
_MOST = 9


@dataclass(frozen=True)
class Planes:
    """The planes value + <gradient, move> = 0 of the nearest boundaries of each image."""

    values: Tensor  # (B, M), positive beyond the boundary
    gradients: Tensor  # (B, M, C, H, W)

    @property
    def fooled(self) -> Tensor:
        """Whether each image (B,) lies beyond a boundary."""
        return (self.values > 0).any(1)

    def nearest(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return value (B,) and gradient (B, C, H, W) of the nearest plane in ``norm``."""
        flat = self.gradients.flatten(2)
        dual = flat.abs().sum(2) if norm == "linf" else flat.norm(dim=2)
        chosen = (self.values.abs() / dual.clamp_min(1e-12)).argmin(1)
        rows = torch.arange(len(chosen), device=chosen.device)
        return self.values[rows, chosen], self.gradients[rows, chosen]


def nearby_planes(model: nn.Module, images: Tensor, labels: Tensor) -> Planes:
    """Return the boundaries of ``model``, linearised at ``images``."""
    x = images.detach().requires_grad_(True)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        values = boundaries(model(x), labels)
        ways = values.shape[1] - (labels.ndim == 1)
        values = values.topk(min(ways, _MOST), dim=1).values
        gradients = [
            torch.autograd.grad(value.sum(), x, retain_graph=True)[0].nan_to_num(nan=0.0)
            for value in values.unbind(1)
        ]
    return Planes(values.detach(), torch.stack(gradients, dim=1))


def project_onto_plane(images: Tensor, value: Tensor, gradient: Tensor, *, norm: Norm) -> Tensor:
    """Return the points in [0, 1] on the plane that are nearest to ``images`` in ``norm``.

    The nearest point lies along the steepest direction, clipped to [0, 1]. The value changes
    monotonically with the distance, so bisection finds it. If the plane does not intersect the box
    in this direction, the furthest point of the box is returned.
    """
    unit = gradient.sign() if norm == "linf" else gradient / norms(gradient).clamp_min(1e-12)
    direction = -value.sign().view(-1, 1, 1, 1) * unit
    low, high = torch.zeros_like(value), torch.full_like(value, 1.0 if norm == "linf" else 1e4)
    for _ in range(40):
        middle = (low + high) / 2
        move = (images + middle.view(-1, 1, 1, 1) * direction).clamp(0, 1) - images
        short = (gradient * move).flatten(1).sum(1).abs() < value.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (images + high.view(-1, 1, 1, 1) * direction).clamp(0, 1)
