"""A detector in the (k, p) plane of an image's principal components (Jere et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import Features
from medspark.defend.detect.logistic import Logistic

__all__ = ["RankPca"]


@dataclass(frozen=True)
class RankPca(Detector):
    """Logistic regression on (k, p); the layer is the convention, uncentred or centred.

    The surrogate is the same regression: an attacker gives it the differentiable (k, p) of
    ``soft_change_point``.
    """

    name = "rank_pca"
    learns_from_attacks = True

    regression: Logistic

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the regression that separates attacked from clean and noisy images."""
        return cls(layer, Logistic.fit(*training.contrast(layer)))

    @property
    def has_gradient(self) -> bool:
        """Whether the score has a gradient: k is a whole number."""
        return False

    def score(self, features: Features) -> Tensor:
        """Return the log-odds (B,) of being attacked."""
        return self.regression(features.layers[self.layer])
