"""Kernel density in the features of the predicted class (Feinman et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training, by_class
from medspark.defend.detect.features import Features

__all__ = ["KernelDensity"]

# Bandwidths that are tried, as multiples of the median distance to the nearest neighbour.
_TRIED = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class KernelDensity(Detector):
    """Minus the log density of an image under the Gaussian kernels of its predicted class."""

    name = "kde"

    points: Tensor  # (N, D), features of clean training images
    labels: Tensor  # (N,)
    bandwidth: float

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector with the bandwidth of the highest leave-one-out likelihood."""
        points, labels = training.reference.layers[layer], training.labels
        classes = by_class(points, labels, training.reference.logits.shape[1], least=2)
        squares = [_without_self(squared_distances(part, part)) for part in classes]
        nearest = torch.cat([square.amin(1) for square in squares]).sqrt().median()
        unit = max(float(nearest), 1e-6)
        width = points.shape[1]

        def likelihood(bandwidth: float) -> float:
            parts = [log_density(s, bandwidth, width, count=len(s) - 1) for s in squares]
            return float(torch.cat(parts).mean())

        best = max((unit * times for times in _TRIED), key=likelihood)
        return cls(layer, points, labels, best)

    def score(self, features: Features) -> Tensor:
        """Return minus the log density under the kernels of the predicted class, (B,)."""
        values, predicted = features.layers[self.layer], features.predicted
        squares = squared_distances(values, self.points)
        others = predicted[:, None] != self.labels[None]
        counts = (~others).sum(1)
        squares = squares.masked_fill(others, torch.inf)
        return -log_density(squares, self.bandwidth, values.shape[1], count=counts)


def squared_distances(values: Tensor, points: Tensor) -> Tensor:
    """Return the squared Euclidean distances (B, N) between rows (B, D) and (N, D).

    They are exact where two rows are equal, and their gradient is finite there.
    """
    distance = torch.cdist(values, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square()


def log_density(squares: Tensor, bandwidth: float, width: int, *, count: int | Tensor) -> Tensor:
    """Return log densities (B,) of ``count`` Gaussian kernels at squared distances (B, N).

    ``width`` is the number of dimensions. A kernel at an infinite distance does not count.
    """
    numbers = torch.as_tensor(count, dtype=squares.dtype, device=squares.device)
    total = torch.logsumexp(-squares / (2 * bandwidth**2), dim=1)
    constant = width * (math.log(bandwidth) + math.log(2 * math.pi) / 2)
    return total - numbers.log() - constant


def _without_self(squares: Tensor) -> Tensor:
    return squares.fill_diagonal_(torch.inf)
