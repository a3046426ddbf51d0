"""Fit every detector on every layer, and choose on validation images what becomes the guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medspark.defend.detect.adaptive import Target, key_of
from medspark.defend.detect.combination import combine
from medspark.defend.detect.detector import ALL_LAYERS, Detector, Training
from medspark.defend.detect.features import Features, joined
from medspark.defend.detect.gather import features_of, right, rows_of
from medspark.defend.detect.registry import COMPONENT_LAYERS, DETECTORS
from medspark.errors import UsageError
from medspark.evaluate.metrics import auroc
from medspark.evaluate.summary import Array, Arrays, Trial

__all__ = ["Choice", "choose", "fit_all", "training_of"]

# With fewer images that an attack fools, a fit or a choice means nothing.
_LEAST = 10


@dataclass(frozen=True)
class Choice:
    """What validation images choose.

    ``auroc`` is the mean over the attacks, by the key of each detector; ``chosen`` becomes the
    guard. ``targets`` are the detectors to attack: the best layer of each, and the combination.
    ``calibration`` (n, G) are scores of clean validation images that took no part in the choice.
    """

    auroc: Mapping[str, float]
    chosen: int
    best_single: int
    targets: tuple[Target, ...]
    calibration: Array


def training_of(
    reference: Arrays,
    contrast: Arrays,
    trials: Sequence[Trial],
    *,
    head: tuple[Tensor, Tensor] | None,
    seed: int,
) -> Training:
    """Return what detectors are fitted on: images that the network gets right when clean.

    Attacked are the images of ``contrast`` that one of ``trials`` fools. Raises UsageError if they
    are fewer than 10.
    """
    reference = rows_of(reference, right(reference, "clean").numpy())
    contrast = rows_of(contrast, right(contrast, "clean").numpy())
    attacked: dict[str, list[Features]] = {}
    for trial in trials:
        fooled = features_of(contrast, trial.key).of(~right(contrast, trial.key))
        attacked.setdefault(trial.name, []).append(fooled)
    by_attack = [joined(parts) for parts in attacked.values()]
    count = sum(len(features.logits) for features in by_attack)
    if count < _LEAST:
        raise UsageError(
            f"fit.attacks: they fool {count} of the training images, and detectors need {_LEAST} "
            "to learn from; give a larger fit.eps, or more fit.contrast_images."
        )
    return Training(
        reference=features_of(reference, "clean"),
        labels=torch.from_numpy(reference["labels"]),
        clean=features_of(contrast, "clean"),
        noisy=features_of(contrast, "noisy"),
        attacked=tuple(features for features in by_attack if len(features.logits)),
        head=head,
        seed=seed,
    )


def fit_all(pairs: Sequence[tuple[str, str]], training: Training) -> tuple[Detector, ...]:
    """Return the detectors of ``pairs`` (name, layer), then the combination of those of one layer.

    rank_pca takes many passes an image, so it is not a part of the combination. Nor is a detector
    of all layers: it knows its own training images too well to be weighed on them.
    """
    singles = [DETECTORS[name].fit(layer, training) for name, layer in pairs]
    of_one_layer = [e for e in singles if e.layer not in (ALL_LAYERS, *COMPONENT_LAYERS)]
    combined = [combine(of_one_layer, training)] if len(of_one_layer) > 1 else []
    return (*singles, *combined)


def choose(
    detectors: Sequence[Detector],
    choosing: Arrays,
    calibrating: Arrays,
    trials: Sequence[Trial],
) -> Choice:
    """Return the choice on the images of ``choosing``, under ``trials``, calibrated on others.

    Of the images of ``calibrating``, only the clean features are needed. The combination is chosen
    only if its AUROC is higher than that of every single feature.
    """
    scores = {
        condition: score_all(detectors, choosing, condition)
        for condition in ("clean", "noisy", *(trial.key for trial in trials))
    }
    honest = np.concatenate([scores["clean"], scores["noisy"]])
    was_right = right(choosing, "clean")
    areas = np.zeros((0, len(detectors)))
    for trial in trials:
        fooled = (was_right & ~right(choosing, trial.key)).numpy()
        if fooled.any():
            areas = np.vstack([areas, _areas(honest, scores[trial.key][fooled])])
    if len(areas) == 0:
        raise UsageError("attacks: none fools a validation image; give a larger eps.")
    mean = areas.mean(0)
    calibration = score_all(detectors, calibrating, "clean")
    best, single = _best(detectors, mean), _best(detectors, mean, single=True)
    return Choice(
        auroc={key_of(each): float(a) for each, a in zip(detectors, mean, strict=True)},
        chosen=best,
        best_single=single,
        targets=_targets(detectors, mean, calibration),
        calibration=calibration,
    )


def score_all(detectors: Sequence[Detector], arrays: Arrays, condition: str) -> Array:
    """Return the scores (N, G) of the images of ``arrays`` under one condition, in float64."""
    features = features_of(arrays, condition)
    with torch.no_grad():
        scores = [each.score(features).double() for each in detectors]
    return torch.stack(scores, dim=1).numpy()


def _areas(honest: Array, attacked: Array) -> Array:
    truth = np.arange(len(honest) + len(attacked)) >= len(honest)
    both = np.concatenate([honest, attacked])
    return np.array([auroc(truth, column) for column in both.T])


def _best(detectors: Sequence[Detector], areas: Array, *, single: bool = False) -> int:
    allowed = [not single or each.name != "combination" for each in detectors]
    return int(np.where(allowed, areas, -1).argmax())


def _targets(detectors: Sequence[Detector], areas: Array, calibration: Array) -> tuple[Target, ...]:
    """Return the best layer of every detector, with the spread of its scores of clean images."""
    best: dict[str, int] = {}
    for number, each in enumerate(detectors):
        if each.name not in best or areas[number] > areas[best[each.name]]:
            best[each.name] = number
    return tuple(
        Target(
            detectors[number],
            float(calibration[:, number].mean()),
            max(float(calibration[:, number].std()), 1e-9),
        )
        for number in best.values()
    )
