"""The plots of a robustness report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from medspark.eps import eps_text
from medspark.evaluate.answers import Answers, answers_of
from medspark.evaluate.decision import net_benefit
from medspark.evaluate.gallery import Exhibit
from medspark.evaluate.names import short, wrapped
from medspark.evaluate.operating_point import OperatingPoint
from medspark.evaluate.result import WORST, AttackFigures, RobustnessResult
from medspark.evaluate.sanity import HOLLOW_MEANS
from medspark.evaluate.summary import Predictions, Trial

Array = npt.NDArray[Any]

_BINS = 10
_DASHED = "Dashed: flagged by a sanity check; do not trust it."


def accuracy_curves(result: RobustnessResult) -> Figure:
    """Draw accuracy over eps for every attack and the worst case, with intervals."""
    figure, axes = _blank(7.4, 4.2)
    face = _marker_face(result, figure)
    for name, attacks in _by_attack(result.under_attack).items():
        attacks = sorted(attacks, key=lambda attack: attack.eps)
        budgets = [0.0, *(attack.eps for attack in attacks)]
        conditions = [result.clean, *attacks]
        values = [condition.accuracy or 0.0 for condition in conditions]
        style = {"lw": 2.5, "color": "black", "zorder": 3} if name == WORST else {"lw": 1.4}
        label = name.replace("_", " ")
        (line,) = axes.plot(budgets, values, marker="o", ms=5, mfc=face, label=label, **style)
        bounds = [condition.intervals for condition in conditions]
        if all("accuracy" in bound for bound in bounds):
            low, high = zip(*(bound["accuracy"] for bound in bounds), strict=True)
            axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.12, lw=0)
    budgets = sorted({0.0, *(attack.eps for attack in result.attacks)})
    axes.set_xticks(budgets, [eps_text(eps) for eps in budgets], fontsize=8, rotation=30)
    axes.set(xlabel="eps", ylabel="accuracy", ylim=(-0.02, 1.02))
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def reliability_diagram(result: RobustnessResult, predictions: Predictions) -> Figure:
    """Draw accuracy over confidence, clean and in the worst case of every eps."""
    figure, axes = _blank(4.6, 4.2)
    axes.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
    face = _marker_face(result, figure)
    for name, probabilities in _clean_and_worst(result, predictions):
        sure, right = answers_of(predictions.labels, probabilities).decisions
        bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
        filled = [k for k in range(_BINS) if (bins == k).any()]
        axes.plot(
            [sure[bins == k].mean() for k in filled],
            [right[bins == k].mean() for k in filled],
            marker="o",
            ms=5,
            mfc=face,
            label=f"{name}, error {calibration_error(probabilities, predictions.labels):.3f}",
        )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(fontsize=8, loc="upper left")
    return figure


def calibration_error(probabilities: Array, labels: Array) -> float:
    """Return the expected calibration error in ten bins (Guo et al. 2017)."""
    sure, right = answers_of(labels, probabilities).decisions
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = [
        (bins == k).mean() * abs(right[bins == k].mean() - sure[bins == k].mean())
        for k in range(_BINS)
        if (bins == k).any()
    ]
    return float(sum(gaps))


def roc_curves(
    result: RobustnessResult,
    predictions: Predictions,
    *,
    classes: Sequence[str],
    positive: int | None,
) -> Figure:
    """Draw the ROC curves of class ``positive``, clean and in the worst case of every eps.

    A dot shows where the answers of ``predictions`` lie. With ``positive`` None, the curves pool
    the decisions on all findings.
    """
    figure, axes = _blank(4.6, 4.2)
    axes.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
    for name, probabilities in _clean_and_worst(result, predictions):
        answers = answers_of(predictions.labels, probabilities)
        watched = answers.watched(positive)
        truth = answers.truth[:, watched].ravel()
        if truth.any() and not truth.all():
            score = np.stack([answers.log_odds(k) for k in watched], axis=1)
            false, true, _ = roc_curve(truth, score.ravel())
            (line,) = axes.plot(false, true, label=name, ls="-" if result.believable else "--")
            called = answers.predicted[:, watched].ravel()
            axes.plot(called[~truth].mean(), called[truth].mean(), "o", ms=6, c=line.get_color())
            axes.legend(fontsize=8, loc="lower right")
    title = "all findings" if positive is None else classes[positive]
    axes.set_title(wrapped(title, width=40, lines=2), parse_math=False)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    if not result.believable:
        figure.supxlabel(_DASHED, fontsize=8)
    return figure


def decision_curve(
    result: RobustnessResult, calibrated: Predictions, point: OperatingPoint
) -> Figure:
    """Draw the net benefit over the threshold, clean and in the worst case of every eps.

    The grey lines call all images positive, and none (Vickers and Elkin 2006).
    """
    figure, axes = _blank(5.2, 4.2)
    positive = calibrated.labels == point.positive
    share, thresholds = float(positive.mean()), np.linspace(0.01, 0.99, 99)
    for name, probabilities in _clean_and_worst(result, calibrated):
        likely = probabilities[:, point.positive]
        benefit = net_benefit(likely, positive, thresholds)
        axes.plot(thresholds, benefit, label=name, ls="-" if result.believable else "--")
    everybody = net_benefit(np.ones(len(positive)), positive, thresholds)
    axes.plot(thresholds, everybody, color="grey", lw=1, label="all positive")
    axes.axhline(0, color="grey", lw=1, ls=":", label="none positive")
    axes.axvline(point.threshold, color="black", lw=1, ls="--", label="decision")
    axes.set(
        xlabel="threshold of the probability",
        ylabel="net benefit",
        xlim=(0, 1),
        ylim=(-0.1, max(share, 0.05) * 1.1),
    )
    axes.legend(fontsize=8, loc="lower left")
    if not result.believable:
        figure.supxlabel(_DASHED, fontsize=8)
    return figure


def image_grid(shown: Sequence[Exhibit], *, classes: Sequence[str], eps: float) -> Figure:
    """Draw image, amplified perturbation and attacked image, with predictions and Grad-CAM."""
    figure = Figure(figsize=(9.5, 2.1 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 5, squeeze=False)
    for row, exhibit in zip(axes, shown, strict=True):
        _draw_exhibit(row, exhibit, classes, eps)
    return figure


def _draw_exhibit(row: Array, exhibit: Exhibit, classes: Sequence[str], eps: float) -> None:
    change = exhibit.attacked - exhibit.clean
    amplified = 0.5 + 0.5 * change / max(float(np.abs(change).max()), 1e-12)
    before, after = (
        answers_of(exhibit.label[None], probabilities[None])
        for probabilities in (exhibit.clean_probabilities, exhibit.attacked_probabilities)
    )
    true = ", ".join(short(classes[k]) for k in before.truth[0].nonzero()[0]) or "none"
    _draw(row[0], exhibit.clean, f"{true}: {_answer(before, classes)}")
    _draw(row[1], exhibit.clean, "Grad-CAM", exhibit.clean_map)
    _draw(row[2], amplified, f"change x{0.5 / max(eps, 1e-12):.0f}")
    _draw(row[3], exhibit.attacked, f"attacked: {_answer(after, classes)}")
    _draw(row[4], exhibit.attacked, "Grad-CAM", exhibit.attacked_map)


def _draw(axes: Axes, pixels: Array, title: str, heat: Array | None = None) -> None:
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
    if heat is not None:
        axes.imshow(heat, cmap="inferno", alpha=0.45, vmin=0, vmax=1)
    axes.set_title(wrapped(title, width=30, lines=3), fontsize=8, parse_math=False)
    axes.set_axis_off()


def _answer(answers: Answers, classes: Sequence[str]) -> str:
    predicted = answers.predicted[0].nonzero()[0]
    return (
        ", ".join(f"{short(classes[k])} {answers.probabilities[0, k]:.0%}" for k in predicted)
        or "none"
    )


def _clean_and_worst(result: RobustnessResult, predictions: Predictions) -> list[tuple[str, Array]]:
    likely = predictions.probabilities
    budgets = [worst.eps for worst in result.worst_case if worst.eps > 0]
    worst = [
        (f"worst case at {eps_text(eps)}", likely[Trial(WORST, 0, eps).key]) for eps in budgets
    ]
    return [("clean", likely["clean"]), *worst]


def _marker_face(result: RobustnessResult, figure: Figure) -> str | None:
    """Return the marker fill: white if the result is flagged, explained in the figure's label."""
    if result.believable:
        return None
    figure.supxlabel(HOLLOW_MEANS, fontsize=8)
    return "white"


def _by_attack(attacks: Sequence[AttackFigures]) -> dict[str, list[AttackFigures]]:
    by_attack: dict[str, list[AttackFigures]] = {}
    for attack in attacks:
        by_attack.setdefault(attack.name, []).append(attack)
    return by_attack


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
