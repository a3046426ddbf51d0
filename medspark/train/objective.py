"""Losses: cross-entropies with label smoothing and class weights, and KL divergence.

All are means over images, so the weighted mean over ranks is the mean of the global batch. Labels
are classes (B,), findings (B, K), or the probabilities (B, 1, K) of classes of mixed images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BinaryCrossEntropy", "CrossEntropy", "Objective", "balanced_positive_weights",
    "balanced_weights", "class_shares", "divergence", "hard_labels", "log_answers", "pair_distance",
]  # fmt: skip

Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over images of the weighted cross-entropy of logits (B, K) and labels.

    Labels are classes (B,), or the probabilities (B, 1, K) of classes.

    It is divided by the number of images, not by the sum of weights as in torch. Otherwise the
    ranks' means would not combine to the global batch's mean.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.temperature != 1:
            logits = logits / self.temperature
        if labels.ndim == 3:
            labels = labels[:, 0].to(logits.dtype)
        if self.class_weights is None and self.label_smoothing == 0:
            return F.cross_entropy(logits, labels)  # the same bits, and no division to derive
        total = F.cross_entropy(
            logits,
            labels,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / len(labels)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean over images and findings of the cross-entropy of logits (B, K) and 0/1 labels (B, K).

    Labels of mixed images lie between 0 and 1. Label smoothing moves both labels towards 0.5.
    """

    positive_weights: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        target = labels.to(logits.dtype).lerp(torch.full_like(logits, 0.5), self.label_smoothing)
        return F.binary_cross_entropy_with_logits(
            logits / self.temperature, target, pos_weight=self.positive_weights
        )


def log_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities (B, Q, A) of the A answers to the Q questions per image.

    Labels (B,) and (B, 1, K) are classes: one question with K answers. Labels (B, K) are findings:
    K questions with the answers yes and no.
    """
    if labels.ndim == 2:
        return F.logsigmoid(torch.stack([logits, -logits], dim=2))
    return logits.log_softmax(1)[:, None]


def divergence(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Return KL(teacher || student) (B,) of logits (B, K); for findings, the mean KL over them."""
    target, answers = log_answers(teacher, labels), log_answers(student, labels)
    return F.kl_div(answers, target, reduction="none", log_target=True).sum(2).mean(1)


def pair_distance(clean: Tensor, adversarial: Tensor, weights: Tensor) -> Tensor:
    """Return sum_jk w_j w_k ((z_j - z_k) - (z'_j - z'_k))^2 (B,) of logits z, z' (B, K).

    ``weights`` (B, K) are w. With d = z - z' and its w-weighted mean m, the sum over all pairs is
    2 sum_k w_k sum_j w_j (d_j - m)^2, which takes K terms, not K^2.
    """
    apart, total = clean - adversarial, weights.sum(1, keepdim=True)
    mean = (weights * apart).sum(1, keepdim=True) / total
    return 2 * total[:, 0] * (weights * (apart - mean).square()).sum(1)


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Return the share (B, K) of each class in an image, from classes (B,) or shares (B, 1, K)."""
    return labels[:, 0] if labels.ndim == 3 else F.one_hot(labels, classes)


def hard_labels(labels: Tensor) -> Tensor:
    """Return the likeliest classes (B,) or findings (B, K) of the labels of mixed images."""
    if labels.ndim == 3:
        return labels[:, 0].argmax(1)
    return (labels > 0.5).to(labels.dtype) if labels.ndim == 2 else labels


def balanced_positive_weights(positives: Sequence[int], images: int) -> Tensor:
    """Return a weight (K,) per finding so that its positives weigh as much as its negatives."""
    counts = torch.tensor(positives, dtype=torch.float32)
    return (images - counts).clamp_min(1) / counts.clamp_min(1)


def balanced_weights(class_counts: Sequence[int]) -> Tensor:
    """Return a weight (K,) per class so that all classes weigh the same; the mean image has 1."""
    counts = torch.tensor(class_counts, dtype=torch.float32).clamp_min(1)
    return counts.sum() / (len(counts) * counts)
