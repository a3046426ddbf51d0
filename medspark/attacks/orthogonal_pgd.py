"""Orthogonal PGD (Bryniarski et al. 2021): fool the model and the detector in turns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medspark.attacks.evasion import SECURE, Evasion, Watch
from medspark.attacks.losses import margin
from medspark.attacks.threat import ThreatModel

__all__ = ["Variant", "orthogonal_pgd"]

Variant = Literal["project_classifier", "project_detector", "selective"]


def orthogonal_pgd(
    watch: Watch,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    variant: Variant,
    step: float | None = None,
) -> Tensor:
    """Return images inside ``threat`` that fool the model with the least suspicion found.

    An image follows the classifier's gradient until a wrong class leads by 0.05, and the negative
    gradient of its suspicion after that. The variants ``project_classifier`` and
    ``project_detector`` remove from that gradient the part along the other one. (The authors' code
    climbs the suspicion if it is given no detector loss.) ``step`` is in pixel units, by default
    eps / 8, or 2.5 eps / ``steps`` for fewer than 20 steps. The cost is one forward pass a step
    and two backward passes, or one for ``selective``.
    """
    length = threat.eps * max(0.125, 2.5 / max(steps, 1)) if step is None else step
    found, x = Evasion.begin(images), images
    for number in range(steps if threat.eps > 0 else 0):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits, suspicion = watch(x, number)
            gain = margin(logits, labels)
            direction = _direction(x, gain, -suspicion, variant)
        found.offer(x, logits, labels, suspicion)
        x = threat.project(x.detach() + length * threat.ascend(direction), images)
    with torch.no_grad():
        logits, suspicion = watch(x.detach(), steps)
        found.offer(x, logits, labels, suspicion)
    return found.images


def _direction(x: Tensor, gain: Tensor, stealth: Tensor, variant: Variant) -> Tensor:
    """Return the direction (B, C, H, W) of the step at ``x``."""
    secure = (gain > SECURE).detach()
    if variant == "selective":
        (direction,) = torch.autograd.grad(torch.where(secure, stealth, gain).sum(), x)
        return direction
    (classifier,) = torch.autograd.grad(gain.sum(), x, retain_graph=True)
    (detector,) = torch.autograd.grad(stealth.sum(), x)
    if variant == "project_classifier":
        classifier = without_part_along(classifier, detector)
    else:
        detector = without_part_along(detector, classifier)
    return torch.where(secure.view(-1, 1, 1, 1), detector, classifier)


def without_part_along(gradient: Tensor, other: Tensor) -> Tensor:
    """Return each image's ``gradient`` minus its projection on ``other``, so orthogonal to it."""
    along, across = other.flatten(1), gradient.flatten(1)
    share = (along * across).sum(1) / along.square().sum(1).clamp_min(1e-30)
    return gradient - share.view(-1, 1, 1, 1) * other
