"""What an attack through a guard looks for: images that fool the model and look harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medspark.attacks.losses import correct, margin

__all__ = ["SECURE", "Evasion", "Watch"]

# Logits (B, K) of images (B, C, H, W), and how suspicious each is (B,), both differentiable. The
# number names what is drawn by chance: with a new one in each step, gradients are expectations over
# transformations (Athalye et al. 2018).
Watch = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# A wrong class leads by this much before an attack turns to the detector (Bryniarski et al. 2021).
SECURE = 0.05


@dataclass
class Evasion:
    """The best images so far: of those that fool the model, the least suspicious one.

    Where none fools the model, it is the one with the highest margin.
    """

    images: Tensor
    suspicion: Tensor  # (B,), infinite where the model is not fooled
    margin: Tensor  # (B,)

    @classmethod
    def begin(cls, images: Tensor) -> Evasion:
        """Return the start: nothing is found yet."""
        never = torch.full((len(images),), torch.inf, device=images.device)
        return cls(images.detach().clone(), never, -never)

    @torch.no_grad()
    def offer(self, images: Tensor, logits: Tensor, labels: Tensor, suspicion: Tensor) -> Tensor:
        """Keep the ``images`` that are better; return which of them fool the model, (B,)."""
        fooled, lead = ~correct(logits, labels), margin(logits, labels)
        quieter = fooled & (suspicion < self.suspicion)
        better = quieter | (~fooled & self.suspicion.isinf() & (lead > self.margin))
        self.images[better] = images.detach()[better]
        self.suspicion[quieter] = suspicion.detach()[quieter]
        self.margin = torch.maximum(self.margin, lead)
        return fooled
