"""An honest client that also holds images of the tail, rightly labelled (Wang et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from medspark.federate.adversary.adversary import Adversary, Known, chosen

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

__all__ = ["EdgeHolder"]


class EdgeHolder(Adversary):
    """Train on some of ``known.edge`` under their true classes, besides the client's own images.

    It is no adversary, but changes what a client trains on as one does.
    """

    edge_images: int = Field(20, ge=1, description="most edge images that it holds")

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return the client's images and the edge images, which the key chooses."""
        import torch

        if known.edge is None or known.edge_labels is None:
            return images, labels
        part = min(1.0, self.edge_images / len(known.edge))
        held = chosen(len(known.edge), part, known.key)
        return (
            torch.cat([images, known.edge[held]]),
            torch.cat([labels, known.edge_labels[held].to(labels.dtype)]),
        )
