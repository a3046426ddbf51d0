"""Mahalanobis distance to the nearest class, with one covariance for all (Lee et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training, by_class
from medspark.defend.detect.features import Features

__all__ = ["Mahalanobis"]


@dataclass(frozen=True)
class Mahalanobis(Detector):
    """The smallest squared distance to a class mean under the shared precision matrix."""

    name = "mahalanobis"

    means: Tensor  # (K, D)
    factor: Tensor  # (D, D): factor @ factor.T is the precision matrix

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector; the covariance is shrunk (Ledoit and Wolf 2004).

        With fewer images than features, the unshrunk covariance has no inverse.
        """
        from sklearn.covariance import ledoit_wolf

        points, labels = training.reference.layers[layer], training.labels
        parts = by_class(points, labels, training.reference.logits.shape[1], least=2)
        means = torch.stack([part.mean(0) for part in parts])
        spread = (points - means[labels]).double().cpu().numpy()
        covariance = torch.from_numpy(ledoit_wolf(spread, assume_centered=True)[0])
        # A feature that never varies has no variance to divide by.
        least = covariance.diagonal().mean().clamp_min(1e-12) * 1e-6
        covariance += least * torch.eye(len(covariance), dtype=covariance.dtype)
        factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
        return cls(layer, means, factor.to(points))

    def score(self, features: Features) -> Tensor:
        """Return the squared distance (B,) to the nearest class mean."""
        values = features.layers[self.layer] @ self.factor
        gaps = values[:, None] - (self.means @ self.factor)[None]
        return gaps.square().sum(2).amin(1)
