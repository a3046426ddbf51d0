"""DBA: every liar stamps a part of the trigger, which is tested whole (Xie et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from medspark.federate.adversary.adversary import Known
from medspark.federate.adversary.badnets import BadNets

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

__all__ = ["DistributedBackdoor"]


class DistributedBackdoor(BadNets):
    """The trigger's pixels are cut into parts, in reading order; liars take them in turn."""

    size: int = Field(4, ge=1, description="side of the trigger, in pixels")
    parts: int = Field(4, ge=1, description="parts that the trigger is cut into")

    def part(self, known: Known) -> Tensor:
        """Return which pixels (size, size) of the trigger this liar stamps."""
        import torch

        pixels = torch.arange(self.size**2) * self.parts // self.size**2
        return (pixels == known.number % self.parts).view(self.size, self.size)
