"""PGD whose change lies in an image's leading principal components, against rank_pca."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medspark.attacks.components import Components
from medspark.attacks.evasion import SECURE, Evasion, Watch
from medspark.attacks.losses import margin
from medspark.attacks.threat import ThreatModel, norms

__all__ = ["leading_pgd"]


def leading_pgd(
    watch: Watch,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
) -> Tensor:
    """Return images inside ``threat`` that fool the model with the least suspicion found.

    The detector expects an attack in the last, small components. The search is repeated with the
    change restricted to each of ``shares`` of the components, the largest ones. Steps are selective
    as in ``orthogonal_pgd``. Only clipping to [0, 1] can leave the span.
    """
    length = threat.eps * max(0.125, 2.5 / max(steps, 1))
    found, parts = Evasion.begin(images), Components.of(images, centred=False)
    for restart, share in enumerate(shares if threat.eps > 0 else ()):
        rank, x = max(round(share * parts.count), 1), images
        for number in range(steps + 1):
            x = x.detach().requires_grad_(True)
            with torch.enable_grad():
                logits, suspicion = watch(x, restart * (steps + 1) + number)
                gain = margin(logits, labels)
                objective = torch.where(gain.detach() > SECURE, -suspicion, gain)
                (direction,) = torch.autograd.grad(objective.sum(), x)
            found.offer(x, logits, labels, suspicion)
            change = x.detach() + length * threat.ascend(direction) - images
            change = _shrunk(parts.leading(change, rank), threat, images)
            x = threat.project(images + change, images)
    return found.images


def _shrunk(change: Tensor, threat: ThreatModel, images: Tensor) -> Tensor:
    """Return ``change``, scaled so that it is within the budget; scaling keeps the span."""
    size = change.abs().amax((1, 2, 3), keepdim=True) if threat.norm == "linf" else norms(change)
    return change * (threat.radius(images) / size.clamp_min(1e-12)).clamp(max=1)
