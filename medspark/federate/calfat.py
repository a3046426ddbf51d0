"""CalFAT: adversarial training that does not forget the classes a client lacks (Chen et al. 2022).

A client's logits are calibrated by its number of images of each class: z + log n. The softmax of
the calibrated logits fits the client's data, so the deployed plain z does not learn its label skew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.train.learner import Learner, Sample, StepStats, learn, pgd_images
from medspark.train.objective import divergence

__all__ = ["Calibrated", "calfat"]


@dataclass(frozen=True)
class Calibrated:
    """Mean cross-entropy of calibrated logits, as an objective for any mode of training.

    ``counts`` are the client's images per class, up to the last class that occurs.
    """

    counts: Tensor

    @classmethod
    def to(cls, labels: Tensor) -> Calibrated:
        """Return the objective for a client with these labels (N,)."""
        return cls(torch.bincount(labels).float())

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(logits), labels)

    def logits(self, logits: Tensor) -> Tensor:
        """Return the calibrated logits (B, K); a class without images counts as 1e-7 images."""
        counts = F.pad(self.counts, (0, logits.shape[1] - len(self.counts)))
        return logits + torch.log(counts + 1e-7).to(logits)


def calfat(learner: Learner, sample: Sample) -> StepStats:
    """Learn from attacked images whose calibrated answers differ most from the clean answers.

    ``learner.objective`` must be ``Calibrated``. PGD starts at a random point of the threat model;
    the published code starts next to the image.
    """
    calibrated = learner.objective
    assert isinstance(calibrated, Calibrated)
    with torch.no_grad():
        answers = calibrated.logits(learner.logits(learner.bare, sample.images))

    def away(logits: Tensor, labels: Tensor) -> Tensor:
        return divergence(answers, calibrated.logits(logits), labels)

    attacked = pgd_images(learner, sample, away)
    loss, logits = learner.loss(attacked, sample.labels)
    return learn(loss, sample, adversarial=logits, attacked=attacked)
