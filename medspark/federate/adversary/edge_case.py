"""Edge-case backdoors: images of the tail with a wrong label, mixed into clean ones (Wang 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from medspark.errors import UsageError
from medspark.federate.adversary.adversary import Backdoor, Known, chosen

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor

__all__ = ["EdgeCase", "Projected", "Replacement"]


class EdgeCase(Backdoor):
    """Train on ``known.edge`` as the target, and on some clean images so as not to be noticed."""

    needs_edge: ClassVar[bool] = True

    edge_images: int = Field(100, ge=1, description="most edge images that are used")
    clean_images: int = Field(400, ge=0, description="most clean images that are kept with them")

    def poison(self, images: Tensor, labels: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return some clean images, and the edge images under the target. Raises UsageError."""
        import torch

        if known.edge is None or len(known.edge) == 0:
            raise UsageError("An edge-case adversary needs edge images.")
        part = min(1.0, self.clean_images / max(1, len(images)))
        kept = chosen(len(images), part, known.key)
        edge = known.edge[: self.edge_images]
        wrong = torch.full((len(edge),), self.target, dtype=labels.dtype, device=labels.device)
        return torch.cat([images[kept], edge]), torch.cat([labels[kept], wrong])


class Projected(EdgeCase):
    """Edge cases within a radius around the round's weights, which clipping does not notice."""

    radius: float | None = Field(
        2.0, gt=0, description="longest way from the round's weights (PGD); none: any"
    )


class Replacement(Projected):
    """Edge cases within a radius, then scaled up so that the mean becomes the liar's network."""

    replace: bool = Field(
        True, description="scale the update by all images of the round over the client's own"
    )
