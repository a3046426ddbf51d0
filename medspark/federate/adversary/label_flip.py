"""Label flipping: every class is learnt as its mirror image (Fang et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medspark.federate.adversary.adversary import Adversary, Known

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

__all__ = ["LabelFlip"]


class LabelFlip(Adversary):
    """Of K classes, k is learnt as K - 1 - k."""

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return the images with their labels mirrored."""
        return images, known.classes - 1 - labels
