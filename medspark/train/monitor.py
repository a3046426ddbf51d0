"""Detect two failures of FGSM training that its own training accuracy does not show.

Catastrophic overfitting: the network withstands only one large step; FGSM accuracy stays high
while PGD accuracy falls (Wong et al. 2020). Label leaking: attacked images are easier than clean
ones, because the attack encodes the label (Kurakin et al. 2017). Both show on training images, so
a fixed batch of them is attacked after each epoch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medspark.attacks.fgsm import fgsm
from medspark.attacks.losses import correct
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.models.classifier import evaluating
from medspark.train.config import MonitorConfig

__all__ = ["Accuracies", "Alarm", "Monitor", "attack_watched"]

_LOGGER = logging.getLogger(__name__)

Cause = Literal["catastrophic overfitting", "label leaking"]


@dataclass(frozen=True)
class Accuracies:
    """Accuracies on the fixed batch in eval mode: clean, under FGSM and under PGD."""

    clean: float
    fgsm: float
    pgd: float


@dataclass(frozen=True)
class Alarm:
    """A detected failure, and a sentence that describes it."""

    cause: Cause
    sentence: str


class Monitor:
    """Judges the accuracies after each epoch; ``best`` is the best PGD accuracy so far."""

    def __init__(self, config: MonitorConfig, *, best: float = 0.0) -> None:
        self.best = best
        self._config = config

    def judge(self, found: Accuracies, *, clean: float, attacked: float) -> Alarm | None:
        """Return the alarm that the accuracies ``found`` raise, or None.

        ``clean`` and ``attacked`` are the epoch's training accuracies; 0 if the mode does not use
        such images.
        """
        limits, best = self._config, self.best
        self.best = max(best, found.pgd)
        if found.fgsm - found.pgd > limits.gap:
            return Alarm(
                "catastrophic overfitting",
                f"accuracy is {found.fgsm:.2f} under FGSM but {found.pgd:.2f} under PGD",
            )
        if best - found.pgd > limits.drop:
            return Alarm(
                "catastrophic overfitting",
                f"accuracy under PGD has fallen from {best:.2f} to {found.pgd:.2f}",
            )
        if 0 < clean < attacked - limits.leak:
            return Alarm(
                "label leaking",
                f"training accuracy is {attacked:.2f} on attacked and {clean:.2f} on clean images",
            )
        return None


def attack_watched(
    model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, steps: int
) -> Accuracies:
    """Attack ``images`` (B, C, H, W) in [0, 1]; return the accuracies of ``model`` in eval mode."""

    def accuracy(shown: Tensor) -> float:
        with torch.no_grad():
            return float(correct(model(shown), labels).float().mean())

    with evaluating(model):
        one = fgsm(model, images, labels, threat=threat)
        many = pgd(model, images, labels, threat=threat, steps=steps)
        return Accuracies(accuracy(images), accuracy(one), accuracy(many))
