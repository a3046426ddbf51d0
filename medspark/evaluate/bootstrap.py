"""Confidence intervals of metrics: percentile bootstrap over groups of images (patients)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.evaluate.answers import Answers, answers_of
from medspark.seeding import derive

Array = npt.NDArray[Any]
Interval = tuple[float, float]

_AT_ONCE = 64  # resamples; bounds memory to this many numbers per image


def intervals(
    labels: Array,
    probabilities: Array,
    groups: Array,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    positive: int | None = None,
    clean: Array | None = None,
    per_class: bool = False,
) -> dict[str, Interval]:
    """Return the interval of each metric of ``medspark.evaluate.metrics.metrics``.

    ``clean``, the probabilities (N, K) before an attack, adds the interval of ``success_rate``.
    ``per_class`` adds ``sensitivity/k``, ``specificity/k`` and ``auroc/k`` of every class k.
    ``groups`` (N,) holds the patient of each image. Patients are resampled, not images, because the
    images of one patient are correlated (Efron and Tibshirani 1993). A metric that is undefined in
    at least half of the resamples has no interval.
    """
    draws: dict[str, list[Array]] = {}
    answers = answers_of(labels, probabilities)
    fooled, held = ~answers.right, None if clean is None else answers_of(labels, clean).right
    for weights in _resamples(groups, samples, seed):
        figures = _weighted(answers, weights, positive, per_class=per_class)
        if held is not None:
            figures["success_rate"] = _share(fooled, held, weights)
        for name, values in figures.items():
            draws.setdefault(name, []).append(values)
    tail = (1 - level) / 2 * 100
    found: dict[str, Interval] = {}
    for name, parts in draws.items():
        values = np.concatenate(parts)
        values = values[~np.isnan(values)]
        if len(values) > samples / 2:
            low, high = np.percentile(values, [tail, 100 - tail])
            found[name] = float(low), float(high)
    return found


def _resamples(groups: Array, samples: int, seed: int) -> Iterator[Array]:
    """Yield how often each image is drawn, in blocks of (resamples, N)."""
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    random = np.random.Generator(np.random.Philox(derive(seed, "bootstrap")))
    for begin in range(0, samples, _AT_ONCE):
        size = min(_AT_ONCE, samples - begin)
        times = random.multinomial(count, np.full(count, 1 / count), size=size)
        yield times[:, member].astype(np.float32)


def _weighted(
    answers: Answers, weights: Array, positive: int | None, *, per_class: bool
) -> dict[str, Array]:
    truth, predicted, every = answers.truth, answers.predicted, range(answers.count)
    watched = answers.watched(positive)
    recalls = np.stack([_share(predicted[:, k], truth[:, k], weights) for k in every])
    spared = np.stack([_share(~predicted[:, k], ~truth[:, k], weights) for k in every])
    areas = {
        k: weighted_auroc(truth[:, k], answers.log_odds(k), weights)
        for k in (every if per_class else watched)
    }
    found = {
        "accuracy": _share(answers.right, np.ones(len(truth), dtype=bool), weights),
        "balanced_accuracy": np.concatenate(
            [recalls, spared] if answers.multi_label else [recalls]
        ).mean(0),
        "auroc": np.stack([areas[k] for k in watched]).mean(0),
        "sensitivity": recalls[watched].mean(0),
        "specificity": spared[watched].mean(0),
    }
    if answers.multi_label:
        found["label_accuracy"] = _mean((predicted == truth).mean(1), weights)
    if per_class:
        for k in every:
            found |= {f"sensitivity/{k}": recalls[k], f"specificity/{k}": spared[k]}
            found[f"auroc/{k}"] = areas[k]
    return found


def _mean(values: Array, weights: Array) -> Array:
    mean: Array = (weights @ values.astype(np.float32)) / weights.sum(1)
    return mean


def _share(hits: Array, base: Array, weights: Array) -> Array:
    """Return the share of ``hits`` in the images ``base`` (masks (N,)), per resample (S,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        chosen = weights[:, base]
        part: Array = (chosen @ hits[base].astype(np.float32)) / chosen.sum(1)
    return part


def weighted_auroc(truth: Array, score: Array, weights: Array) -> Array:
    """Return the areas under the ROC curve (S,) with images weighted by ``weights`` (S, N).

    It is the share of pairs in which the positive image scores higher; ties count half
    (Mann-Whitney). It is NaN for a resample with one class only.
    """
    order = np.argsort(score, kind="stable")
    _, starts = np.unique(score[order], return_index=True)
    positive = np.add.reduceat(weights[:, order] * truth[order], starts, axis=1, dtype=np.float64)
    negative = np.add.reduceat(weights[:, order] * ~truth[order], starts, axis=1, dtype=np.float64)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Array = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
    return area
