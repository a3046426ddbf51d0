"""What an attacker may do: move an image by at most eps, within the pixel range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from medspark.config import Config
from medspark.eps import Eps, eps_text

if TYPE_CHECKING:  # a threat model is also chosen and checked where torch is not imported
    from torch import Tensor

Norm = Literal["linf", "l2"]


class ThreatModel(Config):
    """Images within ``eps`` of the clean one in ``norm``, and within [0, 1]."""

    norm: Norm = Field("linf", description="how a perturbation is measured")
    eps: Eps = Field(
        2 / 255,
        description="budget, a fraction of [0, 1] as 2/255: the largest change of a pixel for "
        "linf, the root mean square over the image's pixels for l2",
    )

    def __str__(self) -> str:
        return f"{self.norm} {eps_text(self.eps)}"

    def radius(self, images: Tensor) -> float:
        """Return the budget as a plain norm of one image's perturbation.

        For l2 it grows with the number of values, so that the same eps is as visible in a
        large image as in a small one.
        """
        return self.eps * math.sqrt(images[0].numel()) if self.norm == "l2" else self.eps

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Return the images next to ``perturbed`` that are allowed in place of ``clean``."""
        if self.norm == "linf":
            return perturbed.maximum(clean - self.eps).minimum(clean + self.eps).clamp(0, 1)
        change = perturbed - clean
        scale = (self.radius(clean) / norms(change).clamp_min(1e-12)).clamp(max=1)
        return (clean + change * scale).clamp(0, 1)

    def ascend(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit eps in which a loss with this ``gradient`` rises fastest.

        Zero where the gradient is exactly zero. Not-a-number counts as zero.
        """
        gradient = gradient.nan_to_num(nan=0.0)
        if self.norm == "linf":
            return gradient.sign()
        return gradient * (math.sqrt(gradient[0].numel()) / norms(gradient).clamp_min(1e-30))

    def random_start(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return allowed images around ``images`` by ``noise`` in [0, 1), shaped like them."""
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
