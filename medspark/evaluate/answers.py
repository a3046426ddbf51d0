"""A network's predictions and the labels: one class per image, or any of K findings.

The shape of the labels decides: classes (N,), or 0/1 findings (N, K). An image counts as right if
all its predictions are right, so a single wrong finding makes it wrong.
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
    """One class per image: labels (N,), and probabilities (N, K) that add up to 1."""

    labels: Array
    probabilities: Array

    # Whether each column is an independent yes/no finding.
    multi_label: ClassVar[bool] = False

    @cached_property
    def truth(self) -> npt.NDArray[np.bool_]:
        """Whether each class is the true one, (N, K)."""
        truth: npt.NDArray[np.bool_] = self.labels[:, None] == np.arange(self.count)
        return truth

    @cached_property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """Whether each class is the predicted one, (N, K)."""
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
        """Whether all predictions for an image are right, (N,)."""
        right: npt.NDArray[np.bool_] = (self.predicted == self.truth).all(1)
        return right

    @property
    def lead(self) -> Array:
        """The true class's probability minus the largest other one, (N,); negative if wrong."""
        rows = np.arange(len(self.labels))
        others = self.probabilities.copy()
        others[rows, self.labels] = -1
        lead: Array = self.probabilities[rows, self.labels] - others.max(1)
        return lead

    @property
    def confidence(self) -> Array:
        """The probability of the predicted class, (N,)."""
        confidence: Array = self.probabilities.max(1)
        return confidence

    @property
    def decisions(self) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The confidence of each decision (M,), and whether it is right (M,)."""
        return self.confidence, self.right

    def watched(self, positive: int | None) -> list[int]:
        """Return the columns over which sensitivity, specificity and AUROC are averaged."""
        if positive is not None:
            return [positive]
        return [1] if self.count == 2 else list(range(self.count))

    def log_odds(self, k: int) -> npt.NDArray[np.float64]:
        """Return the log-odds (N,) of class ``k`` against all other classes together.

        They rank images as the probability of ``k`` does, but still distinguish images for which it
        is rounded to exactly 1: the probabilities of the other classes differ.
        """
        likely = np.maximum(self.probabilities.astype(np.float64), _TINY)
        others = np.delete(likely, k, axis=1).sum(axis=1)
        odds: npt.NDArray[np.float64] = np.log(likely[:, k]) - np.log(others)
        return odds


class MultiLabelAnswers(Answers):
    """Any of K findings per image: 0/1 labels (N, K), and a probability (N, K) for each."""

    multi_label = True

    @cached_property
    def truth(self) -> npt.NDArray[np.bool_]:
        """Whether each image has each finding, (N, K)."""
        truth: npt.NDArray[np.bool_] = self.labels != 0
        return truth

    @cached_property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """Whether each finding is predicted for each image, (N, K)."""
        predicted: npt.NDArray[np.bool_] = self.probabilities > 0.5
        return predicted

    @property
    def lead(self) -> Array:
        """The smallest lead of the truth over all findings, (N,): P(right) minus P(wrong)."""
        odds = 2 * self.probabilities - 1
        lead: Array = np.where(self.truth, odds, -odds).min(1)
        return lead

    @property
    def confidence(self) -> Array:
        """The smallest probability of a decision on an image, (N,), in float32."""
        confidence: Array = self._confidences.min(1)
        return confidence

    @property
    def decisions(self) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The confidence of the decision on each finding of each image, and whether it is right."""
        return self._confidences.ravel(), (self.predicted == self.truth).ravel()

    def watched(self, positive: int | None) -> list[int]:
        """Return the findings over which sensitivity, specificity and AUROC are averaged."""
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
    """Return Answers for labels (N,), MultiLabelAnswers for labels (N, K)."""
    return (MultiLabelAnswers if labels.ndim == 2 else Answers)(labels, probabilities)
