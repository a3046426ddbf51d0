"""Compare an exported model with its torch twin: answers, robustness, and flags."""

from __future__ import annotations

import numpy as np

from medspark.eps import eps_text
from medspark.evaluate.answers import answers_of
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.sanity import Flag
from medspark.evaluate.summary import Array
from medspark.export.judge import CLEAN
from medspark.export.onnx import TOLERANCE
from medspark.export.packages import Precision
from medspark.export.result import Parity
from medspark.models.prediction import probabilities_of

__all__ = ["MOST_GAIN", "flags", "parity"]

# Quantisation masks gradients and does not make a network robust (Bernhard et al. 2019). A gain of
# worst-case accuracy over the twin above this limit is flagged.
MOST_GAIN = 0.02


def parity(labels: Array, twin: Array, export: Array) -> Parity:
    """Return how far the logits ``export`` (N, K) are from those of the ``twin``.

    ``labels`` are classes (N,) or findings (N, K).
    """
    multi_label = labels.ndim == 2
    wanted, found = (
        answers_of(labels, probabilities_of(logits, multi_label=multi_label))
        for logits in (twin, export)
    )
    difference = np.abs(found.probabilities - wanted.probabilities)
    return Parity(
        images=len(labels),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        same_answers=float((found.predicted == wanted.predicted).all(1).mean()),
    )


def flags(
    found: Parity, precision: Precision, twin: RobustnessResult, export: RobustnessResult
) -> list[Flag]:
    """Return the checks of an exported model, against its twin's answers and robustness."""
    if precision == "fp32":
        value = found.largest_difference
        answers = Flag(
            name="differs_from_twin",
            triggered=not value <= TOLERANCE,
            value=value,
            threshold=TOLERANCE,
            sentence=f"a probability differs from the torch network's by {value:.2g}",
        )
    else:
        value = 1 - found.same_answers
        answers = Flag(
            name="other_answers_than_twin",
            triggered=value > 1 - CLEAN.agreement,
            value=value,
            threshold=1 - CLEAN.agreement,
            sentence=f"{value:.1%} of the images get another answer than from the torch network",
        )
    return [answers.measured_on(found.images), *_masking(twin, export)]


def _masking(twin: RobustnessResult, export: RobustnessResult) -> list[Flag]:
    """Flag budgets at which the export looks more robust than its twin."""
    flagged = []
    for figures, reference in zip(export.worst_case, twin.worst_case, strict=True):
        held, expected = figures.accuracy or 0.0, reference.accuracy or 0.0
        gain = held - expected - max(0.0, _clean(export) - _clean(twin))
        flagged.append(
            Flag(
                name=f"more_robust_than_twin_at_{eps_text(figures.eps).replace('/', '_')}",
                triggered=gain > MOST_GAIN,
                value=gain,
                threshold=MOST_GAIN,
                sentence=f"worst-case accuracy is {held:.3f}, but the torch network's is "
                f"{expected:.3f}: the graph masks its gradients, or the attacks are too weak",
            ).measured_on(export.images, eps=figures.eps)
        )
    return flagged


def _clean(report: RobustnessResult) -> float:
    return report.clean.accuracy or 0.0
