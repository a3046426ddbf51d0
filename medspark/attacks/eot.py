"""PGD on a network that answers at random: expectation over transformation (Athalye et al. 2018).

The gradient of one draw of the network is noise as much as direction. The mean over many draws is
the gradient of the expected loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.gradient import input_gradient
from medspark.attacks.losses import Loss, cross_entropy
from medspark.attacks.threat import ThreatModel

__all__ = ["eot_pgd"]


def eot_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    draws: int,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Return images inside ``threat`` that raise the mean loss over the draws of ``model``.

    Each of ``steps`` averages the gradient over ``draws`` passes. The step length is that of
    ``medspark.attacks.pgd``. The parameters get no gradient, and the mode does not change.
    """
    length = threat.eps * max(0.25, 2.5 / max(steps, 1))
    x = (images if start is None else start).detach().clone()
    for _ in range(steps if threat.eps > 0 else 0):
        mean = torch.zeros_like(x)
        for _ in range(draws):
            gradient, _logits = input_gradient(model, x, labels, loss=loss)
            mean += gradient / draws
        x = threat.project(x + length * threat.ascend(mean), images)
    return x
