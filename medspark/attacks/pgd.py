"""Projected gradient descent (Madry et al. 2018): FGSM in small steps."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.attacks.gradient import Logits, input_gradient
from medspark.attacks.losses import Loss, correct, cross_entropy
from medspark.attacks.threat import ThreatModel


def pgd(
    model: Logits,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step: float | None = None,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
    stop_when_fooled: bool = False,
) -> Tensor:
    """Return images inside ``threat`` that raise the loss of ``model``.

    ``step`` is in pixel units. The default is eps / 4, as in Madry et al., or 2.5 eps / ``steps``
    if ``steps`` is too small to cross the ball otherwise. (On chest X-rays, 20 steps of eps / 8
    were weaker than FGSM: small steps stay on the plateaus of ReLU6.) ``stop_when_fooled`` stops
    for an image as soon as it fools the model. That gives the same accuracy for less work, but not
    the highest loss. The model's parameters get no gradient, and its mode does not change.
    """
    length = threat.eps * max(0.25, 2.5 / max(steps, 1)) if step is None else step
    x = (images if start is None else start).detach().clone()
    active = torch.arange(len(x), device=x.device)
    clean, truth, current = images, labels, x
    for _ in range(steps if threat.eps > 0 else 0):
        gradient, logits = input_gradient(model, current, truth, loss=loss)
        if stop_when_fooled:
            keep = correct(logits, truth)
            active, clean, truth = active[keep], clean[keep], truth[keep]
            current, gradient = current[keep], gradient[keep]
            if len(active) == 0:
                break
        current = threat.project(current + length * threat.ascend(gradient), clean)
        x[active] = current
    return x
