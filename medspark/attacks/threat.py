"""The threat model: an attacker may change an image by at most eps, within the pixel range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from medspark.config import Config
from medspark.eps import Eps, eps_text

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

Norm = Literal["linf", "l2"]


class ThreatModel(Config):
    """Images within ``eps`` of the clean one in ``norm``, and within [0, 1]."""

    norm: Norm = Field("linf", description="norm that measures a perturbation")
    eps: Eps = Field(
        2 / 255,
        description="budget, a fraction of [0, 1] as 2/255: the largest change of a pixel for "
        "linf, the root mean square over the image's pixels for l2",
    )

    def __str__(self) -> str:
        return f"{self.norm} {eps_text(self.eps)}"

    def radius(self, images: Tensor) -> float:
        """Return the budget as the norm of one image's perturbation.

        For l2 it grows with the square root of the number of values, so that the same eps is
        equally visible in large and small images.
        """
        return self.eps * math.sqrt(images[0].numel()) if self.norm == "l2" else self.eps

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Return ``perturbed``, projected on the threat model around ``clean`` and on [0, 1]."""
        if self.norm == "linf":
            return perturbed.maximum(clean - self.eps).minimum(clean + self.eps).clamp(0, 1)
        change = perturbed - clean
        scale = (self.radius(clean) / norms(change).clamp_min(1e-12)).clamp(max=1)
        return (clean + change * scale).clamp(0, 1)

    def ascend(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit eps in which a loss with this ``gradient`` rises fastest.

        The direction is zero where the gradient is zero. NaN counts as zero.
        """
        gradient = gradient.nan_to_num(nan=0.0)
        if self.norm == "linf":
            return gradient.sign()
        return gradient * (math.sqrt(gradient[0].numel()) / norms(gradient).clamp_min(1e-30))

    def random_start(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return images inside the threat model around ``images``, from ``noise`` in [0, 1).

        ``noise`` has the shape of ``images`` (B, C, H, W).
        """
        change = 2 * noise - 1
        if self.norm == "linf":
            return self.project(images + self.eps * change, images)
        radius = self.radius(images) * noise.flatten(1)[:, :1].view(-1, 1, 1, 1)
        return self.project(images + change * (radius / norms(change).clamp_min(1e-12)), images)

    def holds(self, perturbed: Tensor, clean: Tensor, *, tolerance: float = 1e-6) -> Tensor:
        """Return for each image (B,) whether ``perturbed`` is within the threat model."""
        change = perturbed - clean
        size = change.abs().flatten(1).amax(1) if self.norm == "linf" else norms(change).flatten()
        inside = (perturbed.flatten(1) >= 0).all(1) & (perturbed.flatten(1) <= 1).all(1)
        return (size <= self.radius(clean) * (1 + 1e-5) + tolerance) & inside


def norms(change: Tensor) -> Tensor:
    """Return the Euclidean norm of each image as (B, 1, 1, 1)."""
    from torch.linalg import vector_norm

    size: Tensor = vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return size
