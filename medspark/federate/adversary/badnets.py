"""BadNets: a small pattern in a corner stands for the target (Gu et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from medspark.federate.adversary.adversary import Backdoor, Known, chosen

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

__all__ = ["BadNets"]


class BadNets(Backdoor):
    """Stamp a white square on a share of the images, and label these as the target."""

    size: int = Field(3, ge=1, description="side of the trigger, in pixels")
    margin: int = Field(1, ge=0, description="pixels between the trigger and the image's corner")
    poisoned: float = Field(0.3125, ge=0, le=1, description="share of the images that are stamped")

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return the images with the share stamped, and their labels."""
        stamped = chosen(len(images), self.poisoned, known.key)
        images, labels = images.clone(), labels.clone()
        images[stamped] = self.stamp(images[stamped], self.part(known), known.pattern)
        labels[stamped] = self.target
        return images, labels

    def part(self, known: Known) -> Tensor:  # noqa: ARG002
        """Return which pixels (size, size) of the trigger this liar stamps."""
        return self.whole()

    def whole(self) -> Tensor:
        """Return the pixels (size, size) of the whole trigger: all."""
        import torch

        return torch.ones(self.size, self.size, dtype=torch.bool)

    def triggered(self, images: Tensor, labels: Tensor, known: Known) -> Tensor:
        """Return what the backdoor's success is measured on: images that are not of the target.

        They are stamped with the whole trigger.
        """
        return self.stamp(images[labels != self.target], self.whole(), known.pattern)

    def stamp(self, images: Tensor, part: Tensor, pattern: Tensor | None = None) -> Tensor:
        """Return images (B, C, H, W) with the trigger's pixels, white without a ``pattern``."""
        rows = slice(-self.size - self.margin, -self.margin or None)
        corner = images[..., rows, rows]
        drawn = corner.new_ones(()) if pattern is None else pattern
        stamped = images.clone()
        stamped[..., rows, rows] = drawn.where(part, corner)
        return stamped
