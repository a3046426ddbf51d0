"""Metrics of predictions: pure functions of labels (N,) or (N, K) and probabilities (N, K)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medspark.config import Config
from medspark.evaluate.answers import Answers, answers_of

Labels = npt.NDArray[Any]
Probabilities = npt.NDArray[Any]


class Metrics(Config):
    """Metrics in [0, 1]; None if undefined, because the labels lack a class."""

    accuracy: float | None
    balanced_accuracy: float | None
    auroc: float | None
    sensitivity: float | None
    specificity: float | None


class FindingMetrics(Metrics):
    """Metrics of K findings per image; ``accuracy`` is the share of images with all findings right.

    Success rate and worst case use the same definition of a right image.
    """

    label_accuracy: float | None = Field(
        description="share of right decisions over all findings of all images; it stays high under "
        "attacks that stop at an image's first wrong finding"
    )


class ClassMetrics(Config):
    """The metrics of one class against all other classes, or of one finding."""

    name: str
    auroc: float | None
    sensitivity: float | None
    specificity: float | None
    intervals: dict[str, tuple[float, float]] = Field({}, description="95 % intervals by metric")


def metrics(
    labels: Labels, probabilities: Probabilities, *, positive: int | None = None
) -> Metrics:
    """Return the metrics of a classifier that predicts the most probable class.

    With two classes, sensitivity, specificity and AUROC are those of class ``positive``, by default
    the last one. With more, they are means over the classes, each against the rest. With findings
    (labels (N, K)), they are means over the findings, or those of ``positive``.
    """
    answers = answers_of(labels, probabilities)
    watched, every = answers.watched(positive), range(answers.count)
    recalls = [_recall(answers, k) for k in every]
    spared = [_true_negative_rate(answers, k) for k in every]
    figures = {
        "accuracy": _mean(answers.right),
        # A class's negatives are the other classes' positives, but findings are independent.
        "balanced_accuracy": _average([*recalls, *(spared if answers.multi_label else ())]),
        "auroc": _average([auroc(answers.truth[:, k], answers.log_odds(k)) for k in watched]),
        "sensitivity": _average([recalls[k] for k in watched]),
        "specificity": _average([spared[k] for k in watched]),
    }
    if answers.multi_label:
        return FindingMetrics(**figures, label_accuracy=_mean(answers.decisions[1]))
    return Metrics(**figures)


def class_metrics(
    labels: Labels, probabilities: Probabilities, *, classes: Sequence[str]
) -> list[ClassMetrics]:
    """Return the metrics of every class against all other classes, or of every finding."""
    answers = answers_of(labels, probabilities)
    return [
        ClassMetrics(
            name=name,
            auroc=auroc(answers.truth[:, k], answers.log_odds(k)),
            sensitivity=_recall(answers, k),
            specificity=_true_negative_rate(answers, k),
        )
        for k, name in enumerate(classes)
    ]


def auroc(truth: npt.NDArray[np.bool_], score: npt.NDArray[Any]) -> float | None:
    """Return the area under the ROC curve, or None if ``truth`` has one value only."""
    if truth.all() or not truth.any():
        return None
    # Imported late: importing sklearn takes as long as torch and would delay a rank's first step.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, score))


def _recall(answers: Answers, k: int) -> float | None:
    return _mean(answers.predicted[answers.truth[:, k], k])


def _true_negative_rate(answers: Answers, k: int) -> float | None:
    return _mean(~answers.predicted[~answers.truth[:, k], k])


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _average(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
