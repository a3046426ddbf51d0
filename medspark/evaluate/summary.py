"""Turn arrays with one row per image into the report; pure functions, independent of row order.

The arrays are ``rows`` (N,), ``labels`` (N,) or (N, K) for findings, probabilities (N, K) called
``clean`` and ``Trial.key``, and the measurements of the sanity checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.attacks.config import KNOWS_LESS
from medspark.errors import RunError
from medspark.evaluate import sanity
from medspark.evaluate.answers import Answers, answers_of
from medspark.evaluate.bootstrap import Interval, intervals
from medspark.evaluate.metrics import ClassMetrics, class_metrics, metrics
from medspark.evaluate.result import (
    QUALITY,
    WORST,
    AttackFigures,
    ConditionFigures,
    RobustnessResult,
)
from medspark.evaluate.sanity import CONTROL_EVERY, PROBE_STEPS, Flag, SanityConfig

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# Where these attacks fail they do less harm than noise, even to a sound network.
_MAY_FAIL = frozenset({"transfer", "unguarded_pgd", "bpda_pgd", "fgsm", "fab", "deepfool", "cw"})


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
class Predictions:
    """A network's predictions, clean and under attack, sorted by row: what drawings need."""

    labels: Array
    # Probabilities (N, K) called ``clean`` and ``Trial.key``, worst cases included.
    probabilities: Arrays


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
) -> RobustnessResult:
    """Return the result on ``arrays`` (each image once, sorted by row) under ``trials``.

    Raises RunError if the network answers an image with numbers that are not finite.
    """
    lost = int((~np.isfinite(arrays["clean"])).any(1).sum())
    if lost:
        raise RunError(
            f"The network answers {lost} of {len(arrays['clean'])} images with numbers that are "
            "not finite: its weights or its batch norms have diverged."
        )
    scored = _Scoring(arrays["labels"], arrays["clean"], positive, detail)
    checks = flags(arrays, trials, limits)
    worst = worst_cases(arrays, trials)
    return RobustnessResult(
        images=len(arrays["labels"]),
        clean=scored.clean_figures(arrays),
        attacks=tuple(scored.attacked(trial, arrays[trial.key], arrays) for trial in trials),
        worst_case=tuple(scored.attacked(trial, values, {}) for trial, values in worst),
        believable=not any(flag.triggered for flag in checks),
        flags=tuple(checks),
    )


def predictions(arrays: Arrays, trials: Sequence[Trial]) -> Predictions:
    """Return the predictions in ``arrays`` (each image once, sorted by row), and worst cases."""
    keys = ["clean", *(trial.key for trial in trials)]
    worst = {trial.key: values for trial, values in worst_cases(arrays, trials)}
    return Predictions(arrays["labels"], {key: arrays[key] for key in keys} | worst)


@dataclass(frozen=True)
class _Scoring:
    labels: Array
    clean: Array
    positive: int | None
    detail: Detail | None

    def clean_figures(self, arrays: Mapping[str, Array]) -> ConditionFigures:
        quality = _means(arrays, "clean", QUALITY)
        return ConditionFigures.model_validate(self._figures(self.clean, None) | quality)

    def attacked(self, trial: Trial, attacked: Array, arrays: Mapping[str, Array]) -> AttackFigures:
        head = {"name": trial.name, "steps": trial.steps, "eps": trial.eps}
        sizes = _means(arrays, trial.key, ("linf_255", "rms_255", *QUALITY))
        success = self._success(attacked)
        more: dict[str, Any] = sizes if success is None else {"success_rate": success} | sizes
        if f"{trial.key}/carried" in arrays:
            more = more | {"carried": int(arrays[f"{trial.key}/carried"].sum())}
        return AttackFigures.model_validate(head | self._figures(attacked, self.clean) | more)

    def _figures(self, probabilities: Array, clean: Array | None) -> dict[str, Any]:
        """Return metrics, and if ``detail`` asks for them, intervals and classes."""
        intervals = self._intervals(probabilities, clean)
        found = {
            "intervals": _overall(intervals),
            "classes": self._classes(probabilities, intervals),
        }
        figures = metrics(self.labels, probabilities, positive=self.positive).model_dump()
        return figures | {name: values for name, values in found.items() if values}

    def _success(self, attacked: Array) -> float | None:
        right = answers_of(self.labels, self.clean).right
        still = answers_of(self.labels, attacked).right
        return float((~still)[right].mean()) if right.any() else None

    def _intervals(self, probabilities: Array, clean: Array | None) -> dict[str, Interval]:
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

    def _classes(
        self, probabilities: Array, intervals: Mapping[str, Interval]
    ) -> list[ClassMetrics]:
        if self.detail is None or not self.detail.classes:
            return []
        by_class = class_metrics(self.labels, probabilities, classes=self.detail.classes)
        return [
            figures.model_copy(update={"intervals": _of_class(k, intervals)})
            for k, figures in enumerate(by_class)
        ]


def _means(arrays: Mapping[str, Array], key: str, names: Sequence[str]) -> dict[str, float]:
    """Return the means over the images of those of ``names`` that were measured for ``key``."""
    found = {name: arrays[f"{key}/{name}"] for name in names if f"{key}/{name}" in arrays}
    return {name: float(values.mean()) for name, values in found.items()}


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
        keys = {0.0: "clean"} | {t.eps: t.key for t in trials if t.name == trial.name}
        chosen = view.attacked_at_every_budget(keys.values())
        if chosen.any():
            by_eps = {eps: view.accuracy(key, chosen) for eps, key in keys.items()}
            flag = sanity.not_falling(trial.name, by_eps, limits)
            found.append(flag.measured_on(int(chosen.sum()), eps=largest, steps=trial.steps))
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
    inside = [view.right(trial.key) for trial in trials if trial.name not in KNOWS_LESS]
    if not inside:
        return []
    white_box = float(np.all(inside, axis=0).mean())
    return [
        sanity.black_box_beats_white_box(trial.name, white_box, view.accuracy(trial.key), limits)
        for trial in trials
        if trial.name in KNOWS_LESS
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

    def attacked_at_every_budget(self, keys: Iterable[str]) -> Array:
        """Return the images (N,) that show whether an attack's accuracy falls with eps.

        These are all of them, or the control images if others were carried over.
        """
        carried = [self.arrays.get(f"{key}/carried") for key in keys]
        if not any(found is not None and found.any() for found in carried):
            return np.ones(len(self.arrays["rows"]), dtype=bool)
        control: Array = self.arrays["rows"] % CONTROL_EVERY == 0
        return control

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
