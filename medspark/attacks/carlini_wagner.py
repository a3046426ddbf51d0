"""The L2 attack of Carlini and Wagner (2017): find the smallest change that fools the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from medspark.attacks.config import CW_SEARCHES, CW_STEPS
from medspark.attacks.losses import boundaries


def carlini_wagner(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = CW_STEPS,
    searches: int = CW_SEARCHES,
    rate: float = 0.05,
    constant: float = 0.1,
) -> Tensor:
    """Return the nearest images in L2 found that fool ``model``; the others stay clean.

    Adam minimises the squared distance plus c times the margin, in a variable whose tanh is the
    image. c grows tenfold until the first success, and is then searched by bisection.
    """
    inside = torch.atanh((images * 2 - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    found, nearest = images.clone(), images.new_full((len(images),), torch.inf)
    low, high = torch.zeros_like(nearest), torch.full_like(nearest, torch.inf)
    weight = torch.full_like(nearest, constant)
    for _ in range(searches):
        fooled = torch.zeros_like(nearest, dtype=torch.bool)
        for x, distance, errs in _descend(model, images, labels, inside, weight, steps, rate):
            fooled |= errs
            nearer = errs & (distance < nearest)
            found[nearer], nearest[nearer] = x[nearer], distance[nearer]
        high = torch.where(fooled, torch.minimum(high, weight), high)
        low = torch.where(fooled, low, torch.maximum(low, weight))
        weight = torch.where(high.isinf(), weight * 10, (low + high) / 2)
    return found


def _descend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    inside: Tensor,
    weight: Tensor,
    steps: int,
    rate: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield after each step the images, their squared distances and whether they fool ``model``."""
    w = inside.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([w], lr=rate)
    for _ in range(steps):
        with torch.enable_grad(), torch.autocast(w.device.type, enabled=False):
            x = (torch.tanh(w) + 1) / 2
            distance = (x - images).square().flatten(1).sum(1)
            worst = boundaries(model(x), labels).amax(1)
            objective = (distance + weight * (-worst).clamp_min(0)).sum()
            (w.grad,) = torch.autograd.grad(objective, w)
        optimiser.step()
        yield x.detach(), distance.detach(), worst.detach() > 0
