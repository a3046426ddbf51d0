"""Label flipping: every class is learnt as its mirror image (Fang et al. 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from medspark.federate.adversary.adversary import Adversary, Known

__all__ = ["LabelFlip"]


class LabelFlip(Adversary):
    """Of K classes, k is learnt as K - 1 - k."""

    classes: int = Field(2, ge=2, description="number of classes")

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the images with their labels mirrored."""
        return images, self.classes - 1 - labels
