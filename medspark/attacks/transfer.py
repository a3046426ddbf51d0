"""Transfer attack: attack other networks, then test the images (Papernot et al. 2016b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medspark.attacks.losses import correct, margin
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel


def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    surrogates: Sequence[nn.Module],
    steps: int = 20,
) -> Tensor:
    """Return images inside ``threat`` made by PGD on ``surrogates``.

    Each image comes from the first surrogate whose image fools ``model``, otherwise from the last.
    """
    found = images.clone()
    held = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for surrogate in surrogates:
        made = pgd(surrogate, images, labels, threat=threat, steps=steps, loss=margin)
        found[held] = made[held]
        with torch.no_grad():
            held &= correct(model(made), labels)
    return found
