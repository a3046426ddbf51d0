"""How good predictions are: pure functions of labels (N,) and probabilities (N, K)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from sklearn.metrics import roc_auc_score

from medspark.config import Config

Labels = npt.NDArray[Any]
Probabilities = npt.NDArray[Any]


class Metrics(Config):
    """Figures in [0, 1]; None where the labels do not define one (a class is absent)."""

    accuracy: float | None
    balanced_accuracy: float | None
    auroc: float | None
    sensitivity: float | None
    specificity: float | None


class ClassMetrics(Config):
    """The same figures for one class against all the others."""

    name: str
    auroc: float | None
    sensitivity: float | None
    specificity: float | None
    intervals: dict[str, tuple[float, float]] = Field({}, description="95 %, by figure")


def metrics(
    labels: Labels, probabilities: Probabilities, *, positive: int | None = None
) -> Metrics:
    """Return the figures of a classifier that answers with its most probable class.

    With two classes sensitivity, specificity and AUROC are those of class ``positive``, the
    last one by default; with more they are means over the classes, each against the rest.
    """
    said = probabilities.argmax(axis=1)
    count = probabilities.shape[1]
    if positive is not None or count == 2:
        watched = [count - 1 if positive is None else positive]
    else:
        watched = list(range(count))
    return Metrics(
        accuracy=_mean(said == labels),
        balanced_accuracy=_average([_recall(labels, said, k) for k in range(count)]),
        auroc=_average([auroc(labels == k, log_odds(probabilities, k)) for k in watched]),
        sensitivity=_average([_recall(labels, said, k) for k in watched]),
        specificity=_average([_true_negative_rate(labels, said, k) for k in watched]),
    )


def class_metrics(
    labels: Labels, probabilities: Probabilities, *, classes: Sequence[str]
) -> list[ClassMetrics]:
    """Return the figures of every class against all the others."""
    said = probabilities.argmax(axis=1)
    return [
        ClassMetrics(
            name=name,
            auroc=auroc(labels == k, log_odds(probabilities, k)),
            sensitivity=_recall(labels, said, k),
            specificity=_true_negative_rate(labels, said, k),
        )
        for k, name in enumerate(classes)
    ]


def log_odds(probabilities: Probabilities, k: int) -> npt.NDArray[np.float64]:
    """Return how much more probable class ``k`` is than all the others together (N,), as a log.

    It ranks as the probability does, and goes on where that is rounded: of the images that a sure
    network gives a probability of exactly 1, the others' share still tells which it is surer of.
    """
    likely = np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny)
    others = np.delete(likely, k, axis=1).sum(axis=1)
    odds: npt.NDArray[np.float64] = np.log(likely[:, k]) - np.log(others)
    return odds


def auroc(truth: npt.NDArray[np.bool_], score: npt.NDArray[Any]) -> float | None:
    """Return the area under the ROC curve, or None where only one class is there."""
    if truth.all() or not truth.any():
        return None
    return float(roc_auc_score(truth, score))


def _recall(labels: Labels, said: Labels, k: int) -> float | None:
    return _mean(said[labels == k] == k)


def _true_negative_rate(labels: Labels, said: Labels, k: int) -> float | None:
    return _mean(said[labels != k] != k)


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
