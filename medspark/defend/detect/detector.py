"""The contract of a detector: fitted on training images, it scores the features of any images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from medspark.defend.detect.features import Features
from medspark.errors import UsageError

__all__ = ["ALL_LAYERS", "Detector", "Training", "by_class"]

# In place of a layer's name: the detector looks at all layers.
ALL_LAYERS = "all"


@dataclass(frozen=True)
class Training:
    """The training images that detectors are fitted on.

    ``reference`` and ``labels`` (N,) are clean images. ``clean``, ``noisy`` and ``attacked`` are
    other images, so that a detector is not fitted on images that it holds as a reference.
    """

    reference: Features
    labels: Tensor
    clean: Features
    noisy: Features
    attacked: tuple[Features, ...]  # one for each attack
    # Weight (K, D) and bias (K,) of the linear layer that makes the logits, if there is one.
    head: tuple[Tensor, Tensor] | None = None
    seed: int = 0

    def contrast(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return features (M, D) of ``layer``, and whether each image is attacked, (M,).

        Clean and noisy images are not attacked.
        """
        parts = [part.layers[layer] for part in (self.clean, self.noisy, *self.attacked)]
        honest = len(parts[0]) + len(parts[1])
        values = torch.cat(parts)
        return values, torch.arange(len(values)) >= honest


@dataclass(frozen=True)
class Detector:
    """Scores images by the features of one layer; a higher score is more suspicious.

    The fields of a detector are tensors, numbers, names and detectors, so it can be kept without
    pickle.
    """

    name: ClassVar[str] = ""
    learns_from_attacks: ClassVar[bool] = False

    layer: str

    @classmethod
    def fit(cls, layer: str, training: Training) -> Self:
        """Return the detector on ``layer``. Raises UsageError if images are too few."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that the detector looks at."""
        return (self.layer,)

    @property
    def has_gradient(self) -> bool:
        """Whether an attacker can differentiate ``score`` itself, as ``surrogate``."""
        return True

    def score(self, features: Features) -> Tensor:
        """Return the score of each image, (B,)."""
        raise NotImplementedError

    def surrogate(self, features: Features) -> Tensor:
        """Return scores (B,) that an attacker can differentiate; by default ``score`` itself."""
        return self.score(features)


def by_class(values: Tensor, labels: Tensor, classes: int, *, least: int) -> list[Tensor]:
    """Return the ``values`` (N, D) of each class. Raises UsageError for fewer than ``least``."""
    parts = [values[labels == k] for k in range(classes)]
    few = min(parts, key=len)
    if len(few) < least:
        raise UsageError(
            f"fit.reference_images: a class has {len(few)} images that the network gets right, a "
            f"detector needs {least}; give more."
        )
    return parts
