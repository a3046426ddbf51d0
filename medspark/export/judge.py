"""Judge a quantised graph on validation images, as they are and attacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medspark.attacks.losses import margin
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.answers import Answers, answers_of
from medspark.evaluate.deploy import evaluation_copy
from medspark.export.runtime import Run
from medspark.models.prediction import Floats, probabilities_of

__all__ = ["ATTACKED", "CLEAN", "Judge", "Limits", "Verdict", "attacked", "in_batches"]

_BATCH = 32
_ERRORS = 300  # at most
_STEPS = 10  # of PGD


@dataclass(frozen=True)
class Limits:
    """How far a graph's answers may be from the float graph's."""

    agreement: float  # share of images with the same answer, at least
    fall: float  # of the accuracy, at most


CLEAN = Limits(agreement=0.99, fall=0.005)
# Attacked images lie near the boundary: MobileNet-V2 in bfloat16 kept .96 of its answers to X-rays.
ATTACKED = Limits(agreement=0.98, fall=0.02)


@dataclass(frozen=True)
class Verdict:
    """How far a graph's answers are from the float graph's, and how far they may be."""

    agreement: float
    fall: float
    limits: Limits

    @property
    def keeps_answers(self) -> bool:
        """Whether the graph answers as the float graph does."""
        return self.agreement >= self.limits.agreement and self.fall <= self.limits.fall


@dataclass(frozen=True)
class Judge:
    """Images (N, C, H, W), their labels, and the float graph's logits (N, K)."""

    images: Floats
    labels: npt.NDArray[np.generic]
    logits: Floats
    limits: Limits = CLEAN

    @classmethod
    def of(
        cls, images: Floats, labels: npt.NDArray[np.generic], run: Run, limits: Limits = CLEAN
    ) -> Judge:
        """Return the judge of ``images``, to which ``run`` is the float graph."""
        return cls(images, labels, in_batches(run, images), limits)

    def verdict(self, run: Run) -> Verdict:
        """Return how far the answers of ``run`` are from the float graph's.

        The agreement is that of the logits of each image with the error of every image, so that a
        few hundred images tell one percent.
        """
        logits = in_batches(run, self.images)
        found, wanted = self._answers(logits), self._answers(self.logits)
        same = [
            (self._answers(self.logits + error).predicted == wanted.predicted).all(1).mean()
            for error in (logits - self.logits)[:_ERRORS]
        ]
        fall = float(wanted.right.mean()) - float(found.right.mean())
        return Verdict(float(np.mean(same)), fall, self.limits)

    def _answers(self, logits: Floats) -> Answers:
        multi_label = self.labels.ndim == 2
        return answers_of(self.labels, probabilities_of(logits, multi_label=multi_label))


def attacked(judge: Judge, network: nn.Module, threat: ThreatModel, *, most: int) -> Floats:
    """Return the first ``most`` images of ``judge`` after PGD on the margin of ``network``.

    An attack leaves images near the boundary, where a small error of the logits changes the answer.
    """
    images, labels = (torch.from_numpy(each[:most]) for each in (judge.images, judge.labels))
    evaluated = evaluation_copy(network, images[:2])
    parts = [
        pgd(evaluated, pixels, truth, threat=threat, steps=_STEPS, loss=margin)
        for pixels, truth in zip(
            torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True
        )
    ]
    return torch.cat(parts).numpy()


def in_batches(run: Run, images: Floats) -> Floats:
    """Return the logits (N, K) of ``images`` (N, C, H, W), computed in batches."""
    parts: Sequence[Floats] = [
        run(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)
    ]
    return np.concatenate(parts).astype(np.float32)
