"""Do detectors know attacks that they have not learnt? Leave one attack, or one budget, out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from medspark.defend.detect.choose import fit_all, score_all, training_of
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.gather import right, rows_of
from medspark.defend.detect.result import Generalisation
from medspark.eps import eps_text
from medspark.errors import UsageError
from medspark.evaluate.metrics import auroc
from medspark.evaluate.summary import Array, Arrays, Trial

__all__ = ["generalisation"]

Head = tuple[Tensor, Tensor] | None


def generalisation(
    pairs: Sequence[tuple[str, str]],
    reference: Arrays,
    contrast: Arrays,
    validation: Arrays,
    trials: Sequence[Trial],
    *,
    head: Head,
    seed: int,
) -> list[Generalisation]:
    """Return AUROC on validation images under attacks that were left out of the fit.

    Each attack of ``trials`` is left out in turn, and each eps; what is left has to fool enough
    images of ``contrast``. Detectors that learn from no attack are left out of the result.
    """

    def fitted(learnt: Sequence[Trial]) -> tuple[Detector, ...]:
        training = training_of(reference, contrast, learnt, head=head, seed=seed)
        return tuple(each for each in fit_all(pairs, training) if each.learns_from_attacks)

    whole, found = fitted(trials), []
    for name, left_out in _left_out(trials):
        learnt = [trial for trial in trials if trial not in left_out]
        try:
            detectors = fitted(learnt)
        except UsageError:  # what is left fools too few images
            continue
        for detector, knowing in zip(detectors, whole, strict=True):
            unseen, seen = (_area(each, validation, left_out) for each in (detector, knowing))
            if unseen is not None:
                found.append(
                    Generalisation(name=detector.name, layer=detector.layer, left_out=name,
                                   auroc=unseen, auroc_if_learnt=seen)
                )  # fmt: skip
    return found


def _left_out(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    """Return what is left out in turn: a name, and the trials of one attack or of one eps."""
    names = list(dict.fromkeys(trial.name for trial in trials))
    budgets = list(dict.fromkeys(trial.eps for trial in trials))
    found = [(name, [t for t in trials if t.name == name]) for name in names if len(names) > 1]
    return found + [
        (f"eps {eps_text(eps)}", [t for t in trials if t.eps == eps])
        for eps in budgets
        if len(budgets) > 1
    ]


def _area(detector: Detector, validation: Arrays, trials: Sequence[Trial]) -> float | None:
    """Return the mean AUROC of ``detector`` over ``trials`` on validation images."""
    honest = [score_all([detector], validation, name)[:, 0] for name in ("clean", "noisy")]
    was_right, areas = right(validation, "clean"), []
    for trial in trials:
        fooled: Array = (was_right & ~right(validation, trial.key)).numpy()
        if fooled.any():
            attacked = score_all([detector], rows_of(validation, fooled), trial.key)[:, 0]
            scores = np.concatenate([*honest, attacked])
            areas.append(auroc(np.arange(len(scores)) >= len(scores) - len(attacked), scores))
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None
