"""Bayesian uncertainty: the variance of the answers with dropout left on (Feinman et al. 2017).

Dropout is put before the last layer, also in networks that were trained without it, so that a draw
costs one product with the head and no pass through the network. Batch norm is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import Features
from medspark.errors import UsageError
from medspark.seeding import derive

__all__ = ["BayesianUncertainty"]


@dataclass(frozen=True)
class BayesianUncertainty(Detector):
    """The variance of the probabilities over dropout masks, averaged over the classes."""

    name = "bu"

    weight: Tensor  # (K, D) of the head
    bias: Tensor  # (K,)
    seed: int
    draws: int = 50
    dropped: float = 0.5  # share of the features that a mask sets to zero

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector; nothing is learnt. Raises UsageError without a linear head."""
        if training.head is None:
            raise UsageError("detectors: bu needs a network whose last layer is linear.")
        weight, bias = training.head
        return cls(layer, weight, bias, derive(training.seed, "bu") % 2**53)

    def score(self, features: Features) -> Tensor:
        """Return the mean variance (B,) over the masks that (seed, ``features.draw``) decides.

        All images of a call share the masks, so the score of an image depends on no other image.
        """
        values = features.layers[self.layer]
        masks = self._masks(features.draw).to(values)
        logits = torch.einsum("bd,td,kd->tbk", values, masks, self.weight) + self.bias
        return logits.softmax(2).var(dim=0, correction=0).mean(1)

    def _masks(self, draw: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.seed, draw) % 2**63)
        kept = 1 - self.dropped
        drawn = torch.rand(self.draws, self.weight.shape[1], generator=generator)
        return (drawn < kept).float() / kept
