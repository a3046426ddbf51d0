"""The losses that attacks maximise: per-image losses (B,) of logits (B, K).

Labels are classes (B,), or 0/1 floats (B, K) for a network with independent findings. The
cross-entropy also takes the labels of mixed images: probabilities (B, 1, K) of classes, and of
findings (B, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, for labels (B, K) the sum over the findings."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        ).sum(1)
    if labels.ndim == 3:
        labels = labels[:, 0].to(logits.dtype)
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest wrong logit minus the true one (Carlini and Wagner 2017).

    Unlike the cross-entropy it does not saturate, so an overconfident network keeps a gradient.
    """
    return boundaries(logits, labels).amax(1)


def boundaries(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the signed distance to each wrong prediction (B, K); positive means wrong.

    For classes, these are all logits minus the true one, and minus infinity at the true one. For
    findings, these are the logits with the sign that is positive for a wrong prediction.
    """
    if labels.ndim == 2:
        return (1 - 2 * labels.to(logits.dtype)) * logits
    true = logits.gather(1, labels[:, None])
    return (logits - true).scatter(1, labels[:, None], -torch.inf)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference-of-logits ratio (Croce and Hein 2020), a scale-free margin.

    With two classes the ratio is constant, so the margin is returned; for findings as well.
    """
    if labels.ndim == 2 or logits.shape[1] < 3:
        return margin(logits, labels)
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def rescaled(loss: Loss) -> Loss:
    """Return ``loss`` on logits whose largest gap is scaled to 1, per image.

    The gap is the largest minus the smallest logit; for findings, the largest distance of a logit
    to 0, where the prediction changes. This undoes the temperature of defensive distillation, which
    only removes the gradient of the cross-entropy (Carlini and Wagner 2016).
    """

    def of_unit_logits(logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 2:
            gap = logits.abs().amax(1, keepdim=True)
        else:
            gap = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
        return loss(logits / gap.detach().clamp_min(1e-12), labels)

    return of_unit_logits


def predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the predictions in the form of ``labels``: classes (B,) or findings (B, K)."""
    return (logits > 0).to(labels.dtype) if labels.ndim == 2 else logits.argmax(1)


def probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the probabilities (B, K): softmax for classes, sigmoid for findings."""
    # In float32 the sigmoid would round to 1 at moderate logits and lose the order.
    return logits.double().sigmoid() if labels.ndim == 2 else logits.softmax(1)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image (B,) whether the prediction is right; for findings, all of them."""
    predicted = predictions(logits, labels)
    return (predicted == labels).all(1) if labels.ndim == 2 else predicted == labels
