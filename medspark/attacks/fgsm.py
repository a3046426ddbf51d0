"""Fast gradient sign method (Goodfellow et al. 2015), one step with an optional random start."""

from __future__ import annotations

from torch import Tensor, nn

from medspark.attacks.gradient import input_gradient
from medspark.attacks.losses import Loss, cross_entropy
from medspark.attacks.threat import ThreatModel


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    step: float | None = None,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Return images inside ``threat`` that raise the loss of ``model``.

    The gradient is taken at ``start``, by default the clean images. ``step`` is in pixel units, by
    default eps. The model's parameters get no gradient, and its mode does not change.
    """
    x = images if start is None else start
    gradient, _ = input_gradient(model, x, labels, loss=loss)
    return one_step(images, gradient, threat=threat, step=step, start=x)


def one_step(
    images: Tensor,
    gradient: Tensor,
    *,
    threat: ThreatModel,
    step: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return the images one step along a known ``gradient`` from ``start``, inside ``threat``."""
    x = (images if start is None else start).detach()
    length = threat.eps if step is None else step
    return threat.project(x + length * threat.ascend(gradient), images)
