"""Local intrinsic dimensionality, by its maximum-likelihood estimate (Ma et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import Features
from medspark.errors import UsageError

__all__ = ["LocalDimension", "local_dimension"]

_REFERENCES, _NEIGHBOURS = 100, 20


@dataclass(frozen=True)
class LocalDimension(Detector):
    """The estimate among the neighbours in a reference batch of clean training images.

    The reference images are never scored themselves, so no neighbour is left out. (The authors'
    code drops each image's first neighbour: a clean image itself, but a real one of an attacked.)
    """

    name = "lid"

    points: Tensor  # (N, D)
    neighbours: int

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector with the first 100 reference images, and 20 neighbours."""
        points = training.reference.layers[layer][:_REFERENCES]
        if len(points) < 3:
            raise UsageError(
                f"fit.reference_images: lid needs at least 3, and there are {len(points)}."
            )
        return cls(layer, points, min(_NEIGHBOURS, len(points) - 1))

    def score(self, features: Features) -> Tensor:
        """Return the estimated dimension around each image, (B,)."""
        distance = torch.cdist(
            features.layers[self.layer],
            self.points,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return local_dimension(distance, self.neighbours)


def local_dimension(distance: Tensor, neighbours: int) -> Tensor:
    """Return -k / sum(log(r_i / r_k)) over the k nearest of ``distance`` (B, N), as (B,).

    A distance of zero counts as a very small one. Where all k are equal, the estimate has no limit
    and 1e6 is returned.
    """
    nearest = distance.topk(neighbours, dim=1, largest=False, sorted=True).values.clamp_min(1e-12)
    total = (nearest / nearest[:, -1:]).log().sum(1)
    return neighbours / (-total).clamp_min(neighbours * 1e-6)
