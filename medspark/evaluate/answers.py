"""A network's answers beside the truth: one class of each image, or any of K findings.

The shape of the labels tells which: classes (N,), or 0/1 findings (N, K). An image is right when
all answers about it are right, so one with findings is fooled by a single wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Answers:
    """One class of each image: labels (N,), and probabilities (N, K) that add up to 1."""

    labels: Array
    probabilities: Array

    # Whether each column is a question of its own, with a yes and a no.
    multi_label: ClassVar[bool] = False

    @cached_property
    def truth(self) -> npt.NDArray[np.bool_]:
        """What is true of each image, (N, K)."""
        truth: npt.NDArray[np.bool_] = self.labels[:, None] == np.arange(self.count)
        return truth

    @cached_property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """What the network answers for each image, (N, K)."""
        predicted: npt.NDArray[np.bool_] = self.probabilities.argmax(1)[:, None] == np.arange(
            self.count
        )
        return predicted

    @property
    def count(self) -> int:
        """The number of classes or findings."""
        return int(self.probabilities.shape[1])

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether all answers about an image are right, (N,)."""
        right: npt.NDArray[np.bool_] = (self.predicted == self.truth).all(1)
        return right

    @property
    def lead(self) -> Array:
        """By how much the true answer leads the next one, (N,); negative is wrong."""
        rows = np.arange(len(self.labels))
        others = self.probabilities.copy()
        others[rows, self.labels] = -1
        lead: Array = self.probabilities[rows, self.labels] - others.max(1)
        return lead

    @property
    def confidence(self) -> Array:
        """The probability of the class that is answered, (N,)."""
        confidence: Array = self.probabilities.max(1)
        return confidence

    @property
    def decisions(self) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The confidence of each decision, and whether it is right, (M,) both."""
        return self.confidence, self.right

    def watched(self, positive: int | None) -> list[int]:
        """Return the columns that sensitivity, specificity and AUROC are about."""
        if positive is not None:
            return [positive]
        return [1] if self.count == 2 else list(range(self.count))

    def log_odds(self, k: int) -> npt.NDArray[np.float64]:
        """Return how much more probable class ``k`` is than all the others together (N,), as a log.

        It ranks as the probability does, and goes on where that is rounded: of the images that a
        sure network gives a probability of exactly 1, the others' share still tells which it is
        surer of.
        """
        likely = np.maximum(self.probabilities.astype(np.float64), _TINY)
        others = np.delete(likely, k, axis=1).sum(axis=1)
        odds: npt.NDArray[np.float64] = np.log(likely[:, k]) - np.log(others)
        return odds


class MultiLabelAnswers(Answers):
    """Any of K findings of each image: 0/1 labels (N, K), and a probability (N, K) for each."""

    multi_label = True

    @cached_property
    def truth(self) -> npt.NDArray[np.bool_]:
        """Which findings each image has, (N, K)."""
        truth: npt.NDArray[np.bool_] = self.labels != 0
        return truth

    @cached_property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """Which findings the network answers that each image has, (N, K)."""
        predicted: npt.NDArray[np.bool_] = self.probabilities > 0.5
        return predicted

    @property
    def lead(self) -> Array:
        """By how much the truth leads at the finding where it does least, (N,)."""
        odds = 2 * self.probabilities - 1
        lead: Array = np.where(self.truth, odds, -odds).min(1)
        return lead

    @property
    def confidence(self) -> Array:
        """The probability of the least sure decision on an image, (N,), in float32."""
        confidence: Array = self._confidences.min(1)
        return confidence

    @property
    def decisions(self) -> tuple[Array, npt.NDArray[np.bool_]]:
        """How sure the decision on each finding of each image is, and whether it is right."""
        return self._confidences.ravel(), (self.predicted == self.truth).ravel()

    def watched(self, positive: int | None) -> list[int]:
        """Return the findings that sensitivity, specificity and AUROC are about: all, or one."""
        return list(range(self.count)) if positive is None else [positive]

    def log_odds(self, k: int) -> npt.NDArray[np.float64]:
        """Return the log-odds (N,) of finding ``k``."""
        likely = self.probabilities[:, k].astype(np.float64)
        odds: npt.NDArray[np.float64] = np.log(np.maximum(likely, _TINY)) - np.log(
            np.maximum(1 - likely, _TINY)
        )
        return odds

    @property
    def _confidences(self) -> Array:
        confidence: Array = np.maximum(self.probabilities, 1 - self.probabilities).astype(
            np.float32
        )
        return confidence


def answers_of(labels: Array, probabilities: Array) -> Answers:
    """Return ``probabilities`` (N, K) beside ``labels``: classes (N,), or findings (N, K)."""
    return (MultiLabelAnswers if labels.ndim == 2 else Answers)(labels, probabilities)
