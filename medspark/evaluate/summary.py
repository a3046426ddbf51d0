"""Turn arrays with one row per image into the report; pure functions, independent of row order.

The arrays are ``rows`` (N,), ``labels`` (N,) or (N, K) for findings, probabilities (N, K) called
``clean`` and ``Trial.key``, and the measurements of the sanity checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.attacks.config import BLACK_BOX
from medspark.evaluate import sanity
from medspark.evaluate.answers import Answers, answers_of
from medspark.evaluate.bootstrap import Interval, intervals
from medspark.evaluate.metrics import ClassMetrics, Metrics, class_metrics, metrics
from medspark.evaluate.sanity import PROBE_STEPS, Flag, SanityConfig

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

WORST = "worst_case"

# Where these attacks fail they do less harm than noise, even to a sound network.
_MAY_FAIL = frozenset({"transfer", "fgsm", "fab", "deepfool", "cw"})


@dataclass(frozen=True)
class Trial:
    """One attack at one budget."""

    name: str
    steps: int
    eps: float

    @property
    def key(self) -> str:
        """The name of the trial's arrays: attack@2 for 2/255, the same in all versions."""
        return f"{self.name}@{round(255 * self.eps, 4):g}"


@dataclass(frozen=True)
class AttackResult:
    """The metrics under one attack at one budget."""

    name: str
    steps: int
    eps: float
    metrics: Metrics
    # Share of the images right when clean that are wrong under attack.
    success_rate: float | None = None
    # Sizes of the change, mean over the images, in grey levels of 255: maximum and RMS.
    linf_255: float | None = None
    rms_255: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)
    classes: list[ClassMetrics] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the result as result documents hold it."""
        head = {"name": self.name, "steps": self.steps, "eps": self.eps}
        more = {
            "success_rate": self.success_rate,
            "linf_255": self.linf_255,
            "rms_255": self.rms_255,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "classes": [figures.model_dump() for figures in self.classes],
        }
        return (
            head
            | self.metrics.model_dump()
            | {k: v for k, v in more.items() if v not in (None, {}, [])}
        )


@dataclass(frozen=True)
class RobustReport:
    """Metrics clean and under attack, and the flags on results that you should not trust."""

    images: int
    clean: Metrics
    attacks: list[AttackResult]
    # Per eps: each image under the worst attack at that eps or a smaller one.
    worst: list[AttackResult] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    clean_intervals: dict[str, Interval] = field(default_factory=dict)
    clean_classes: list[ClassMetrics] = field(default_factory=list)
    # Sorted by row: labels, and probabilities (N, K) clean and by ``Trial.key``.
    labels: Array = field(default_factory=lambda: np.empty(0), repr=False)
    probabilities: Arrays = field(default_factory=dict, repr=False)

    @property
    def believable(self) -> bool:
        """Whether no sanity check triggered."""
        return not any(flag.triggered for flag in self.flags)

    def as_json(self) -> dict[str, Any]:
        """Return the report as result documents hold it."""
        clean: dict[str, Any] = self.clean.model_dump()
        if self.clean_intervals:
            clean["intervals"] = {k: list(v) for k, v in self.clean_intervals.items()}
        if self.clean_classes:
            clean["classes"] = [figures.model_dump() for figures in self.clean_classes]
        return {
            "images": self.images,
            "clean": clean,
            "attacks": [attack.as_json() for attack in self.attacks],
            "worst_case": [attack.as_json() for attack in self.worst],
            "believable": self.believable,
            "flags": [flag.model_dump() for flag in self.flags],
        }


@dataclass(frozen=True)
class Detail:
    """The settings of intervals and metrics per class, for a full report."""

    # The patient of each row (N,), for the intervals; None: each image is its own group.
    groups: Array | None = None
    samples: int = 1000
    classes: Sequence[str] = ()
    seed: int = 0


def summarise(
    arrays: Arrays,
    trials: Sequence[Trial],
    *,
    limits: SanityConfig,
    positive: int | None = None,
    detail: Detail | None = None,
) -> RobustReport:
    """Return the report on ``arrays`` (each image once, sorted by row) under ``trials``."""
    labels, clean = arrays["labels"], arrays["clean"]
    scored = _Scoring(labels, clean, positive, detail)
    worst = worst_cases(arrays, trials)
    clean_intervals = scored.intervals(clean, None)
    return RobustReport(
        images=len(labels),
        clean=metrics(labels, clean, positive=positive),
        attacks=[scored.result(trial, arrays[trial.key], arrays) for trial in trials],
        worst=[scored.result(trial, values, {}) for trial, values in worst],
        flags=flags(arrays, trials, limits),
        clean_intervals=_overall(clean_intervals),
        clean_classes=scored.classes(clean, clean_intervals),
        labels=labels,
        probabilities={"clean": clean}
        | {trial.key: arrays[trial.key] for trial in trials}
        | {trial.key: values for trial, values in worst},
    )


@dataclass(frozen=True)
class _Scoring:
    labels: Array
    clean: Array
    positive: int | None
    detail: Detail | None

    def result(self, trial: Trial, attacked: Array, arrays: Mapping[str, Array]) -> AttackResult:
        sizes = {
            name: float(arrays[f"{trial.key}/{name}"].mean())
            for name in ("linf_255", "rms_255")
            if f"{trial.key}/{name}" in arrays
        }
        intervals = self.intervals(attacked, self.clean)
        return AttackResult(
            name=trial.name,
            steps=trial.steps,
            eps=trial.eps,
            metrics=metrics(self.labels, attacked, positive=self.positive),
            success_rate=self._success(attacked),
            intervals=_overall(intervals),
            classes=self.classes(attacked, intervals),
            **sizes,
        )

    def _success(self, attacked: Array) -> float | None:
        right = answers_of(self.labels, self.clean).right
        still = answers_of(self.labels, attacked).right
        return float((~still)[right].mean()) if right.any() else None

    def intervals(self, probabilities: Array, clean: Array | None) -> dict[str, Interval]:
        if self.detail is None or self.detail.samples == 0:
            return {}
        groups = self.detail.groups
        return intervals(
            self.labels,
            probabilities,
            np.arange(len(self.labels)) if groups is None else groups,
            samples=self.detail.samples,
            seed=self.detail.seed,
            positive=self.positive,
            clean=clean,
            per_class=bool(self.detail.classes),
        )

    def classes(
        self, probabilities: Array, intervals: Mapping[str, Interval]
    ) -> list[ClassMetrics]:
        if self.detail is None or not self.detail.classes:
            return []
        by_class = class_metrics(self.labels, probabilities, classes=self.detail.classes)
        return [
            figures.model_copy(update={"intervals": _of_class(k, intervals)})
            for k, figures in enumerate(by_class)
        ]


def _overall(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    return {name: interval for name, interval in intervals.items() if "/" not in name}


def _of_class(k: int, intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    ending = f"/{k}"
    return {n.removesuffix(ending): i for n, i in intervals.items() if n.endswith(ending)}


def worst_cases(arrays: Arrays, trials: Sequence[Trial]) -> list[tuple[Trial, Array]]:
    """Return for each eps the probabilities (N, K) with the smallest lead of the true class.

    An image that a smaller budget fools also counts as fooled at a larger one, which allows the
    same perturbation.
    """
    labels, worst, found = arrays["labels"], arrays["clean"], []
    for eps in sorted({trial.eps for trial in trials}):
        for trial in trials:
            if trial.eps == eps:
                attacked = answers_of(labels, arrays[trial.key])
                harm = attacked.lead < answers_of(labels, worst).lead
                worst = np.where(harm[:, None], arrays[trial.key], worst)
        found.append((Trial(WORST, 0, eps), worst))
    return found


def flags(arrays: Arrays, trials: Sequence[Trial], limits: SanityConfig) -> list[Flag]:
    """Return the sanity checks for which ``arrays`` has data, with their measuring conditions."""
    view = _View(arrays)
    images = len(arrays["labels"])
    found = [
        sanity.saturated(view.saturated(), limits),
        sanity.same_answer(view.same_answer(), limits),
        sanity.same_class(view.same_class(), limits),
    ]
    if "zero_gradient" in arrays:
        found.append(sanity.zero_gradients(float(arrays["zero_gradient"].mean()), limits))
    found = [flag.measured_on(images) for flag in found]
    if not trials:
        return found
    largest = max(trial.eps for trial in trials)
    at_largest = [trial for trial in trials if trial.eps == largest]
    for trial in at_largest:
        by_eps = {t.eps: view.accuracy(t.key) for t in trials if t.name == trial.name}
        flag = sanity.not_falling(trial.name, {0.0: view.accuracy("clean")} | by_eps, limits)
        found.append(flag.measured_on(images, eps=largest, steps=trial.steps))
    overall = [*_outside(arrays, trials), *_black_box_flags(view, at_largest, limits)]
    found += [flag.measured_on(images, eps=largest) for flag in overall]
    if "unsteady" in arrays and (~np.isnan(arrays["unsteady"])).any():
        found += _probe_flags(view, at_largest, limits)
    return found


def _outside(arrays: Arrays, trials: Sequence[Trial]) -> list[Flag]:
    shares = [
        float(arrays[f"{trial.key}/outside"].mean())
        for trial in trials
        if f"{trial.key}/outside" in arrays
    ]
    return [sanity.outside(max(shares))] if shares else []


def _black_box_flags(view: _View, trials: Sequence[Trial], limits: SanityConfig) -> list[Flag]:
    inside = [view.right(trial.key) for trial in trials if trial.name not in BLACK_BOX]
    if not inside:
        return []
    white_box = float(np.all(inside, axis=0).mean())
    return [
        sanity.black_box_beats_white_box(trial.name, white_box, view.accuracy(trial.key), limits)
        for trial in trials
        if trial.name in BLACK_BOX
    ]


def _probe_flags(view: _View, trials: Sequence[Trial], limits: SanityConfig) -> list[Flag]:
    """Return the checks on the probed images, at the largest budget."""
    chosen = ~np.isnan(view.arrays["unsteady"])
    images, held = int(chosen.sum()), float(view.arrays["margin_held"][chosen].mean())
    unsteady = sanity.unsteady(float(view.arrays["unsteady"][chosen].max()), limits)
    found = [unsteady.measured_on(images)]
    for trial in trials:
        accuracy = view.accuracy(trial.key, chosen)
        if trial.name == "fgsm":
            flag = sanity.fgsm_above_margin(accuracy, held, limits)
            found.append(flag.measured_on(images, eps=trial.eps, steps=PROBE_STEPS))
        elif trial.name == "pgd":
            flag = sanity.pgd_above_margin(accuracy, trial.steps, held, limits)
            found.append(flag.measured_on(images, eps=trial.eps, steps=PROBE_STEPS))
        if trial.name not in _MAY_FAIL:
            share = view.noise_wins(trial.key, chosen)
            flag = sanity.noise_as_strong(trial.name, share, limits)
            found.append(flag.measured_on(images, eps=trial.eps, steps=trial.steps))
    return found


@dataclass(frozen=True)
class _View:
    arrays: Arrays

    def answers(self, name: str, chosen: Array | slice = slice(None)) -> Answers:
        return answers_of(self.arrays["labels"][chosen], self.arrays[name][chosen])

    def right(self, name: str) -> Array:
        return self.answers(name).right

    def accuracy(self, name: str, chosen: Array | slice = slice(None)) -> float:
        return float(self.right(name)[chosen].mean())

    def noise_wins(self, attack: str, chosen: Array) -> float:
        """Return the share of right predictions that noise harms at least as much as the attack."""
        right = chosen & self.right("clean")
        attacked, noise = (self.answers(name, right).lead for name in (attack, "noise"))
        return float(((attacked >= noise) & (attacked > 0)).mean()) if right.any() else 0.0

    def same_answer(self) -> float:
        """Return the share of images with the most frequent probabilities, not counting saturated.

        One image of the most frequent ones does not count, so all-different images give 0.
        """
        clean = self.arrays["clean"]
        unsaturated = clean[self.answers("clean").confidence < 1.0]
        if len(unsaturated) < 2:
            return 0.0
        _, counts = np.unique(unsaturated, axis=0, return_counts=True)
        return float((counts.max() - 1) / len(clean))

    def same_class(self) -> float:
        """Return the share of other classes' images that get the most frequent prediction."""
        clean = self.answers("clean")
        answers, counts = np.unique(clean.predicted, axis=0, return_counts=True)
        commonest = answers[::-1][counts[::-1].argmax()]  # the first class, if several tie
        others = (clean.truth != commonest).any(1)
        return float((clean.predicted == commonest).all(1)[others].mean()) if others.any() else 0.0

    def saturated(self) -> float:
        right = self.right("clean")
        sure = self.answers("clean").confidence >= 1.0
        return float(sure[right].mean()) if right.any() else 0.0


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Return the concatenated arrays of several parts, each image once, sorted by row."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return each_once(whole)


def each_once(arrays: Arrays) -> Arrays:
    """Return ``arrays`` sorted by row, without repeated images."""
    _, first = np.unique(arrays["rows"], return_index=True)
    return {name: values[first] for name, values in arrays.items()}
