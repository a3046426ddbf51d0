"""Distance to the clean images in a contrastive embedding, as Yin et al. (2306.07992) describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import Features

__all__ = ["Contrastive"]


@dataclass(frozen=True)
class Contrastive(Detector):
    """One minus the cosine between an embedding and the mean of clean training images."""

    name = "contrastive"

    prototype: Tensor  # (E,), of unit length

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector with the mean embedding of the reference images."""
        return cls.of(layer, training.reference.layers[layer])

    @classmethod
    def of(cls, layer: str, embeddings: Tensor) -> Self:
        """Return the detector of clean ``embeddings`` (N, E)."""
        return cls(layer, F.normalize(F.normalize(embeddings, dim=1).mean(0), dim=0))

    def score(self, features: Features) -> Tensor:
        """Return one minus the cosine with the prototype, (B,)."""
        return 1 - F.normalize(features.layers[self.layer], dim=1) @ self.prototype
