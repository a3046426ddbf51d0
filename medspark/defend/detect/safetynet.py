"""SafetyNet: an RBF support vector machine on binarised activations (Lu et al. 2017).

A bit says whether a feature exceeds its median over clean training images. Lu et al. binarise
activations at zero; mean activations of a layer are hardly ever zero, but where they are, the
median is zero too and the bits are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medspark.defend.detect.detector import Detector, Training
from medspark.defend.detect.features import Features
from medspark.defend.detect.rbf import rbf_kernel

__all__ = ["SafetyNet"]

# The surrogate's bits change over this share of a feature's standard deviation.
_SOFTNESS = 0.1


@dataclass(frozen=True)
class SafetyNet(Detector):
    """The decision function of the machine: positive means attacked."""

    name = "safetynet"
    learns_from_attacks = True

    medians: Tensor  # (D,)
    softness: Tensor  # (D,), the width of a soft bit
    vectors: Tensor  # (V, D), the support vectors: codes of training images
    coefficients: Tensor  # (V,)
    intercept: float
    gamma: float

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the machine that separates attacked from clean and noisy training images."""
        from sklearn.svm import SVC

        values, attacked = training.contrast(layer)
        clean = training.reference.layers[layer]
        medians = clean.median(0).values
        codes = (values > medians).double().cpu().numpy()
        machine = SVC(kernel="rbf", gamma="scale").fit(codes, attacked.numpy())
        return cls(
            layer=layer,
            medians=medians,
            softness=(_SOFTNESS * clean.std(0)).clamp_min(1e-6),
            vectors=torch.from_numpy(machine.support_vectors_).to(clean),
            coefficients=torch.from_numpy(machine.dual_coef_[0]).to(clean),
            intercept=float(machine.intercept_[0]),
            gamma=float(machine._gamma),
        )

    @property
    def has_gradient(self) -> bool:
        """Whether the score has a gradient: a bit has none."""
        return False

    def score(self, features: Features) -> Tensor:
        """Return the decision function on the bits, (B,). It has no gradient."""
        values = features.layers[self.layer]
        return self._decide((values > self.medians).to(values.dtype))

    def surrogate(self, features: Features) -> Tensor:
        """Return the decision function on soft bits: sigmoids in place of steps."""
        values = features.layers[self.layer]
        return self._decide(torch.sigmoid((values - self.medians) / self.softness))

    def _decide(self, codes: Tensor) -> Tensor:
        return rbf_kernel(codes, self.vectors, self.gamma) @ self.coefficients + self.intercept
