"""Cross-entropy with label smoothing and class weights, as a mean that ranks can combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CrossEntropy", "balanced_weights"]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over images of the weighted cross-entropy of logits (B, K) and labels (B,).

    It is divided by the number of images, not by the sum of weights as torch's own is: only
    so do the ranks' means combine to the global batch's mean.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits if self.temperature == 1 else logits / self.temperature,
            labels,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / len(labels)


def balanced_weights(class_counts: Sequence[int]) -> Tensor:
    """Return a weight (K,) per class that makes all classes count alike; their mean image has 1."""
    counts = torch.tensor(class_counts, dtype=torch.float32).clamp_min(1)
    return counts.sum() / (len(counts) * counts)
