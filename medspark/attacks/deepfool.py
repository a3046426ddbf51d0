"""DeepFool (Moosavi-Dezfooli et al. 2016): step to the nearest linearised boundary, repeatedly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.boundary import nearby_planes
from medspark.attacks.config import DEEPFOOL_STEPS
from medspark.attacks.threat import Norm, norms


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    steps: int = DEEPFOOL_STEPS,
    overshoot: float = 0.02,
) -> Tensor:
    """Return images in [0, 1] near ``images`` that fool ``model``, if ``steps`` steps suffice."""
    x = images.clone()
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        planes = nearby_planes(model, x[active], labels[active])
        keep = ~planes.fooled
        active = active[keep]
        if len(active) == 0:
            break
        value, gradient = planes.nearest(norm)
        move = _shortest(value[keep], gradient[keep], norm)
        x[active] = (x[active] + (1 + overshoot) * move).clamp(0, 1)
    return x


def _shortest(value: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    # Step slightly beyond the plane, because rounding could leave the image on the near side.
    distance = (value.abs() + 1e-6).view(-1, 1, 1, 1)
    if norm == "linf":
        dual = gradient.abs().sum((1, 2, 3), keepdim=True)
        return distance / dual.clamp_min(1e-12) * gradient.sign()
    return distance / norms(gradient).clamp_min(1e-12) ** 2 * gradient
