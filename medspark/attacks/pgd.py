"""Projected gradient descent (Madry et al. 2018): FGSM in small steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.attacks.gradient import input_gradient
from medspark.attacks.losses import Loss, correct, cross_entropy
from medspark.attacks.threat import ThreatModel


def pgd(
    model: nn.Module,
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

    ``step`` is in pixel units; by default eps / 4, as Madry et al. take it, or 2.5 eps /
    ``steps`` where so few steps would not cross the ball. (On chest X-rays 20 steps of eps / 8
    were weaker than FGSM: small steps stay on the plateaus that ReLU6 makes.)
    ``stop_when_fooled`` leaves an image as soon as the model errs on it: the same accuracy
    for less work, but the loss is not driven up any further, so only accuracy may be read
    off. Parameters receive no gradient, and the mode of the model is left as it is found.
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
