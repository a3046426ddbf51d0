"""Fit temperature and operating point to a few labelled images of a site; pure functions.

A quantile of 50 scores is too uncertain to be a threshold. A logistic model of the scores is fitted
instead (Platt 1999), with a prior at the model's own calibration, and the cut is chosen on the
smoothed scores of the sample, with the fitted probabilities in place of the labels. So every image
of the sample says something about both classes. The larger the sample, the more its labels count.

Scores (N,) are raw log-odds of the positive class, before any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.evaluate.bootstrap import Interval
from medspark.evaluate.decision import best_cut, probability, rates_at, wilson
from medspark.models.card import Criterion, Rate
from medspark.seeding import derive

__all__ = [
    "Fit", "Goal", "Sample", "Site", "differ", "draw", "fit", "images_needed", "interval", "judge",
    "miscalibrated",
]  # fmt: skip

Array = npt.NDArray[Any]

# Standard deviations of the priors of the slope's logarithm and of the shift of log-odds. They and
# the number below were chosen on validation images changed in contrast, noise, sharpness and zoom.
_SLOPE, _SHIFT = 0.5, 3.0
# Fitted probabilities count as much as the labels of this many images.
_MODEL_IMAGES = 200
_ITERATIONS, _ENOUGH = 50, 1e-8
# The points of a standard normal distribution that smooth the scores.
_SMOOTH = np.array([NormalDist().inv_cdf((k + 0.5) / 15) for k in range(15)])
_FOLDS = 50
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Goal:
    """What a cut is chosen for, as in the card's decision."""

    criterion: Criterion
    target: float | None = None


@dataclass(frozen=True)
class Sample:
    """Labelled images: whether each is positive, its patient, and its scores.

    ``clean`` scores give the temperature; ``scores``, of attacked images if the decision was made
    under attack, give the cut.
    """

    positive: Array
    patients: Array
    clean: Array
    scores: Array

    def of(self, rows: Array) -> Sample:
        """Return the images ``rows``."""
        return Sample(self.positive[rows], self.patients[rows], self.clean[rows], self.scores[rows])

    @property
    def has_both(self) -> bool:
        """Whether both classes are there."""
        return bool(self.positive.any() and not self.positive.all())


@dataclass(frozen=True)
class Fit:
    """A temperature, and the cut of the scores."""

    temperature: float
    cut: float

    @property
    def threshold(self) -> float:
        """The cut as a probability at the temperature."""
        return float(probability(self.cut / self.temperature))


@dataclass(frozen=True)
class Site:
    """What a sample says of a site: the fit, and how it does on images that it has not seen."""

    fit: Fit
    temperature: Interval | None
    threshold: Interval | None
    sensitivity: Rate
    specificity: Rate


def draw(patients: Array, count: int, *, seed: int) -> tuple[Array, Array]:
    """Return the sorted rows of ``count`` images, and of the images of patients not drawn.

    ``patients`` (N,) holds the patient of each image. Patients are drawn, not images; of the last
    one only as many images are taken as are missing.
    """
    random = np.random.Generator(np.random.Philox(derive(seed, "site sample")))
    names, member = np.unique(patients, return_inverse=True)
    turn = random.permutation(len(names))[member]
    order = np.lexsort((random.permutation(len(patients)), turn))
    chosen = order[:count]
    rest = np.flatnonzero(~np.isin(turn, turn[chosen]))
    return np.sort(chosen), rest


def fit(sample: Sample, goal: Goal, *, temperature: float) -> Fit:
    """Return temperature and cut for the site of ``sample``; ``temperature`` is the model's own.

    Raises ValueError if a class is missing.
    """
    if not sample.has_both:
        raise ValueError("there are images of one class only")
    positive = sample.positive.astype(np.float64)
    slope, _ = _logistic(sample.clean / temperature, positive, shift=0.0)
    scores = sample.scores / temperature
    steeper, shift = _logistic(scores, positive, shift=_SHIFT)
    smooth = scores[:, None] + _bandwidth(scores) * _SMOOTH
    trust = len(scores) / (len(scores) + _MODEL_IMAGES)
    likely = trust * positive[:, None] + (1 - trust) * probability(steeper * smooth + shift)
    cut = best_cut(smooth.ravel(), likely.ravel(), criterion=goal.criterion, target=goal.target)
    return Fit(temperature / slope, cut * temperature)


def _logistic(scores: Array, positive: Array, *, shift: float) -> tuple[float, float]:
    """Return slope a > 0 and shift b of P(positive) = sigmoid(a score + b), at their mode.

    log a has a normal prior around 0, b one with the deviation ``shift``; 0 keeps b at 0. Fisher
    scoring with halved steps finds the maximum.
    """
    precision = np.array([1 / _SLOPE**2, 1 / shift**2 if shift else 1.0])
    free = np.array([1.0, 1.0 if shift else 0.0])

    def loss(at: Array) -> float:
        margins = np.exp(at[0]) * scores + at[1]
        nll = float((np.logaddexp(0, margins) - positive * margins).sum())
        return nll + float((precision * at**2).sum()) / 2

    at, value = np.zeros(2), loss(np.zeros(2))
    for _ in range(_ITERATIONS):
        slope = np.exp(at[0])
        likely = probability(slope * scores + at[1])
        moves = np.stack([slope * scores, np.ones_like(scores)]) * free[:, None]
        uphill = moves @ (positive - likely) - precision * at
        curve = (moves * (likely * (1 - likely))) @ moves.T + np.diag(precision)
        step = np.linalg.solve(curve, uphill)
        while (lower := loss(at + step)) > value and np.abs(step).max() > _ENOUGH:
            step = step / 2
        if np.abs(step).max() <= _ENOUGH:
            break
        at, value = at + step, lower
    return float(np.exp(at[0])), float(at[1])


def _bandwidth(scores: Array) -> float:
    """Return Silverman's (1986) width of a normal kernel."""
    low, high = np.quantile(scores, [0.25, 0.75])
    spread = min(float(scores.std()), float(high - low) / 1.34)
    return float(0.9 * spread * len(scores) ** -0.2)


def judge(sample: Sample, goal: Goal, *, temperature: float, resamples: int, seed: int) -> Site:
    """Return the fit to ``sample``, with 95 % intervals, and its rates.

    The rates are cross-validated: each image is judged by a fit without its patient. The intervals
    of the fit are of ``resamples`` bootstrap resamples of the patients.
    """
    names, member = np.unique(sample.patients, return_inverse=True)
    random = np.random.Generator(np.random.Philox(derive(seed, "site judge")))
    fold = random.permutation(len(names))[member] % min(_FOLDS, len(names))
    margins = np.empty(len(member))
    for k in range(int(fold.max()) + 1):
        others = sample.of(np.flatnonzero(fold != k))
        # Without one class nothing can be fitted: the model's own cut stands in.
        cut = fit(others, goal, temperature=temperature).cut if others.has_both else 0.0
        margins[fold == k] = sample.scores[fold == k] - cut
    found, spared = rates_at(margins, sample.positive, 0.0, sample.patients)
    fits = [
        fit(again, goal, temperature=temperature)
        for again in _resampled(sample, member, resamples, random)
        if again.has_both
    ]
    return Site(
        fit=fit(sample, goal, temperature=temperature),
        temperature=_spread([each.temperature for each in fits]),
        threshold=_spread([each.threshold for each in fits]),
        sensitivity=found,
        specificity=spared,
    )


def _resampled(
    sample: Sample, member: Array, times: int, random: np.random.Generator
) -> Iterator[Sample]:
    """Yield the sample with its patients drawn anew, with replacement."""
    count = int(member.max()) + 1
    for _ in range(times):
        often = np.bincount(random.integers(count, size=count), minlength=count)
        yield sample.of(np.repeat(np.arange(len(member)), often[member]))


def _spread(values: Sequence[float]) -> Interval | None:
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def interval(rate: Rate) -> Interval:
    """Return the 95 % interval of a rate, by patients."""
    return wilson(rate.right / rate.design_effect, rate.images / rate.design_effect)


def images_needed(rate: Rate, *, share: float, within: float = 0.05) -> int:
    """Return how many images of the site would give the rate with +- ``within``, at 95 %.

    ``share`` is the class's share of the images. The variance is that of Agresti and Coull's (1998)
    estimate, so that a rate of 1 needs images too.
    """
    images = rate.images / rate.design_effect
    middle = (rate.right / rate.design_effect + _Z95**2 / 2) / (images + _Z95**2)
    binomial = _Z95**2 * middle * (1 - middle) / within**2
    return math.ceil(binomial * rate.design_effect / share)


def differ(one: Rate, other: Rate) -> float:
    """Return the probability that two samples of one rate differ as much as these, by chance.

    It is Fisher's exact test on counts divided by their design effects (Rao and Scott 1992).
    """
    from scipy.stats import fisher_exact  # takes as long to import as torch

    table = []
    for rate in (one, other):
        right, images = (round(n / rate.design_effect) for n in (rate.right, rate.images))
        table.append([right, images - right])
    return float(fisher_exact(table).pvalue)


def miscalibrated(sample: Sample, *, temperature: float) -> float:
    """Return the probability that a calibrated model fits the labels as badly by chance.

    It is the score test of slope 1 and shift 0 of the log-odds (Cox 1958), on one image of each
    patient, since the test needs independent images.
    """
    from scipy.stats import chi2

    _, first = np.unique(sample.patients, return_index=True)
    scores, positive = sample.clean[first] / temperature, sample.positive[first]
    likely = probability(scores)
    moves = np.stack([scores, np.ones_like(scores)])
    uphill = moves @ (positive - likely)
    expected = (moves * (likely * (1 - likely))) @ moves.T
    return float(chi2.sf(uphill @ np.linalg.pinv(expected) @ uphill, df=2))
