"""What an attack drives up: per-image losses (B,) of logits (B, K).

Labels are classes (B,) or, for a network with independent findings, 0/1 floats (B, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, or the sum of the findings' for labels (B, K)."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        ).sum(1)
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best wrong logit minus the true one (Carlini and Wagner 2017).

    Unlike the cross-entropy it does not saturate, so a network that is far too sure of
    itself keeps a gradient.
    """
    return boundaries(logits, labels).amax(1)


def boundaries(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each way of erring (B, K) how near it is: an error where positive.

    For classes, every logit minus the true one, and minus infinity at the true one; for
    findings, each one's logit away from what it should be.
    """
    if labels.ndim == 2:
        return (1 - 2 * labels.to(logits.dtype)) * logits
    true = logits.gather(1, labels[:, None])
    return (logits - true).scatter(1, labels[:, None], -torch.inf)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference-of-logits ratio (Croce and Hein 2020): the margin, scale-free.

    Needs three classes; with two the ratio is constant, so the margin is returned.
    """
    if labels.ndim == 2 or logits.shape[1] < 3:
        return margin(logits, labels)
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def rescaled(loss: Loss) -> Loss:
    """Return ``loss`` of logits whose largest gap is scaled to one, image by image.

    The gap of a finding is that between its logit and 0, where the answer changes.

    Undoes the temperature of defensive distillation, which only starves the cross-entropy
    of gradient (Carlini and Wagner 2016).
    """

    def of_unit_logits(logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 2:
            gap = logits.abs().amax(1, keepdim=True)
        else:
            gap = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
        return loss(logits / gap.detach().clamp_min(1e-12), labels)

    return of_unit_logits


def predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what the network says, in the form of ``labels``: classes, or findings."""
    return (logits > 0).to(labels.dtype) if labels.ndim == 2 else logits.argmax(1)


def probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the probabilities (B, K) of classes that exclude each other, or of findings."""
    # In float32 those of findings would be rounded to 1 early, and their order lost.
    return logits.double().sigmoid() if labels.ndim == 2 else logits.softmax(1)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image (B,) whether the network is right, in every finding at once."""
    predicted = predictions(logits, labels)
    return (predicted == labels).all(1) if labels.ndim == 2 else predicted == labels
