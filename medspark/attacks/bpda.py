"""Attacks on a network behind a denoiser that do not rely on the denoiser's gradient."""

from __future__ import annotations

from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from medspark.attacks.losses import Loss, cross_entropy
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel

__all__ = ["Denoised", "bpda_pgd", "is_denoised", "unguarded_pgd"]


class Denoised(Protocol):
    """A network that classifies what its denoiser makes of an image."""

    def denoiser(self, images: Tensor, /) -> Tensor:
        """Return the denoised images (B, C, H, W) in [0, 1]."""

    def classify(self, images: Tensor, /) -> Tensor:
        """Return the logits (B, K) of images as they are."""


def is_denoised(model: object) -> TypeGuard[Denoised]:
    """Return whether ``model`` has a denoiser before its classifier.

    isinstance with a runtime-checkable protocol does not see submodules from Python 3.12 on.
    """
    return hasattr(model, "denoiser") and hasattr(model, "classify")


class _Approximated(nn.Module):
    """A denoised network whose denoiser has the gradient of the identity."""

    def __init__(self, of: Denoised) -> None:
        super().__init__()
        self._of = of

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's own logits (B, K)."""
        with torch.no_grad():
            change = self._of.denoiser(images) - images
        return self._of.classify(images + change)


class _Unguarded(nn.Module):
    """The classifier of a denoised network alone."""

    def __init__(self, of: Denoised) -> None:
        super().__init__()
        self._of = of

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images as they are."""
        return self._of.classify(images)


def bpda_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Return images inside ``threat`` by PGD with the identity as the denoiser's gradient.

    Backward pass differentiable approximation (Athalye et al. 2018): it finds what a gradient that
    the denoiser shatters or blurs would hide. ``model`` is ``Denoised``.
    """
    approximated = _Approximated(cast(Denoised, model))
    return pgd(approximated, images, labels, threat=threat, steps=steps, start=start, loss=loss)


def unguarded_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Return images inside ``threat`` by PGD on the classifier, as if it had no denoiser.

    This attacker knows nothing of the denoiser. Where the attack does more harm than one through
    the denoiser, that one has failed. ``model`` is ``Denoised``.
    """
    bare = _Unguarded(cast(Denoised, model))
    return pgd(bare, images, labels, threat=threat, steps=steps, start=start, loss=loss)
