"""FAB, the fast adaptive boundary attack (Croce and Hein 2020, "Minimally distorted")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.boundary import nearby_planes, project_onto_plane
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct
from medspark.attacks.threat import Norm, norms

_BIAS, _OVERSHOOT, _RETREAT = 0.1, 1.05, 0.9  # alpha_max, eta and beta of the paper


def fab(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    rng: KeyedRandom,
    steps: int = 50,
    restarts: int = 1,
    radius: float = 0.0,
) -> Tensor:
    """Return the nearest images found in [0, 1] that fool ``model``; the others stay clean.

    The first start is the clean image. Restarts are random, at most ``radius`` away in ``norm``, as
    ThreatModel.radius measures it.
    """
    found, distance = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
    for restart in range(restarts):
        x = images
        if restart > 0:
            noise = 2 * rng.noise(images, f"fab/{restart}") - 1
            span = noise.abs().amax((1, 2, 3), keepdim=True) if norm == "linf" else norms(noise)
            x = (images + radius / 2 * noise / span).clamp(0, 1)
        for _ in range(steps):
            x = _towards_boundary(model, images, labels, x, norm)
            fooled = _fooled(model, x, labels)
            away = _length(x - images, norm)
            nearer = fooled & (away < distance)
            found[nearer], distance[nearer] = x[nearer], away[nearer]
            # Beyond the boundary, step back towards the image and search for a nearer point.
            retreat = torch.lerp(images, x, _RETREAT)
            x = torch.where(fooled.view(-1, 1, 1, 1), retreat, x)
    return found


@torch.no_grad()
def _fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return ~correct(model(images), labels)


def _towards_boundary(
    model: nn.Module, images: Tensor, labels: Tensor, x: Tensor, norm: Norm
) -> Tensor:
    """Step to the nearest plane, with a bias towards its point nearest to the clean image."""
    value, gradient = nearby_planes(model, x, labels).nearest(norm)
    from_here = project_onto_plane(x, value, gradient, norm=norm) - x
    at_image = value - (gradient * (x - images)).flatten(1).sum(1)
    from_image = project_onto_plane(images, at_image, gradient, norm=norm) - images
    here, there = _length(from_here, norm), _length(from_image, norm)
    bias = (here / (here + there).clamp_min(1e-12)).clamp(max=_BIAS).view(-1, 1, 1, 1)
    return torch.lerp(x + _OVERSHOOT * from_here, images + _OVERSHOOT * from_image, bias).clamp(
        0, 1
    )


def _length(change: Tensor, norm: Norm) -> Tensor:
    return change.abs().flatten(1).amax(1) if norm == "linf" else norms(change).flatten()
