"""PGD on the classifier's margin minus a weighted suspicion, with a search over the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.attacks.evasion import SECURE, Evasion, Watch
from medspark.attacks.losses import margin
from medspark.attacks.threat import ThreatModel

__all__ = ["weighted_pgd"]


def weighted_pgd(
    watch: Watch,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    searches: int = 5,
    weight: float = 1.0,
) -> Tensor:
    """Return images inside ``threat`` that fool the model with the least suspicion found.

    Each image has a weight of its own. It grows tenfold while the attack succeeds, and is then
    searched by bisection for the largest with which it does (as in Carlini and Wagner 2017). The
    search makes sense if a change of suspicion by 1 is about as large as one of a logit.
    """
    length = threat.eps * max(0.125, 2.5 / max(steps, 1))
    found = Evasion.begin(images)
    weights = torch.full((len(images),), weight, device=images.device, dtype=images.dtype)
    low, high = torch.zeros_like(weights), torch.full_like(weights, torch.inf)
    for search in range(searches if threat.eps > 0 else 0):
        x, succeeds = images, torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for number in range(steps + 1):
            x = x.detach().requires_grad_(True)
            with torch.enable_grad():
                logits, suspicion = watch(x, search * (steps + 1) + number)
                # A lead beyond the secure one is worth nothing.
                gain = margin(logits, labels).clamp_max(SECURE) - weights * suspicion
                (direction,) = torch.autograd.grad(gain.sum(), x)
            succeeds |= found.offer(x, logits, labels, suspicion)
            x = threat.project(x.detach() + length * threat.ascend(direction), images)
        low = torch.where(succeeds, torch.maximum(low, weights), low)
        high = torch.where(succeeds, high, torch.minimum(high, weights))
        weights = torch.where(high.isinf(), weights * 10, (low + high) / 2)
    return found.images
