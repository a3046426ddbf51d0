"""How good predictions are: pure functions of labels (N,) or (N, K) and probabilities (N, K)."""

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
    """Figures in [0, 1]; None where the labels do not define one (a class is absent)."""

    accuracy: float | None
    balanced_accuracy: float | None
    auroc: float | None
    sensitivity: float | None
    specificity: float | None


class FindingMetrics(Metrics):
    """Figures where an image has any of K findings; ``accuracy`` asks for all of them at once.

    So it is the share of images that hold, the same that success and worst case are about.
    """

    label_accuracy: float | None = Field(
        description="share of right decisions over all findings of all images; attacks that stop "
        "at an image's first wrong finding leave it high"
    )


class ClassMetrics(Config):
    """The same figures for one class against all the others, or for one finding."""

    name: str
    auroc: float | None
    sensitivity: float | None
    specificity: float | None
    intervals: dict[str, tuple[float, float]] = Field({}, description="95 %, by figure")


def metrics(
    labels: Labels, probabilities: Probabilities, *, positive: int | None = None
) -> Metrics:
    """Return the figures of a classifier that answers with what is most probable.

    With two classes sensitivity, specificity and AUROC are those of class ``positive``, the
    last one by default; with more they are means over the classes, each against the rest. With
    findings (labels (N, K)) they are means over the findings, or those of ``positive``.
    """
    answers = answers_of(labels, probabilities)
    watched, every = answers.watched(positive), range(answers.count)
    recalls = [_recall(answers, k) for k in every]
    spared = [_true_negative_rate(answers, k) for k in every]
    figures = {
        "accuracy": _mean(answers.right),
        # Of classes each one's negatives are the others' positives; of findings they are not.
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
    """Return the figures of every class against all the others, or of every finding."""
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
    """Return the area under the ROC curve, or None where only one class is there."""
    if truth.all() or not truth.any():
        return None
    # Loaded when it is first asked for: it takes a rank as long as torch, before its first step.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, score))


def _recall(answers: Answers, k: int) -> float | None:
    return _mean(answers.predicted[answers.truth[:, k], k])


def _true_negative_rate(answers: Answers, k: int) -> float | None:
    return _mean(~answers.predicted[~answers.truth[:, k], k])


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
