"""From the arrays of an examination to figures: oblivious ones beside those of the worst attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medspark.defend.detect.adaptive import Target, key_of
from medspark.defend.detect.change_point import CENTRED, UNCENTRED
from medspark.defend.detect.conformal import share_interval, threshold
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.examine import adaptive_key
from medspark.defend.detect.result import (
    AdaptiveFigures,
    CaughtFigures,
    DetectorFigures,
    FalsePositives,
    NotAttacked,
    RankDefence,
    RateFigures,
)
from medspark.evaluate.metrics import auroc
from medspark.evaluate.summary import Array, Arrays, Trial

__all__ = ["FIDELITY", "Scores", "rank_defence", "surrogate_fidelity"]

# The rank correlation that a surrogate needs with its detector, clean and attacked.
FIDELITY = 0.9
_RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Scores:
    """The scores of all detectors on the test images, and what is needed to judge them."""

    arrays: Arrays
    detectors: Sequence[Detector]
    targets: Sequence[Target]
    trials: Sequence[Trial]
    adaptive: Sequence[str]  # names of the attacks through a target
    calibration: Array  # (n, G)
    rate: float  # the guard's false-positive rate

    def figures(self) -> list[DetectorFigures]:
        """Return the figures of each detector under each oblivious attack at each eps."""
        fidelity = surrogate_fidelity(self.arrays, self.targets, self.detectors)
        return [
            self._figures(number, trial, fidelity)
            for number in range(len(self.detectors))
            for trial in self.trials
        ]

    def wrong_under(self, eps: float) -> Array:
        """Return which images (N,) are wrong, clean or under any attack up to ``eps``."""
        wrong: Array = ~np.all(
            [self.arrays[f"{name}/right"] for name in self._conditions(eps)], axis=0
        )
        return wrong

    def least_suspicious(self, number: int, eps: float) -> Array:
        """Return the lowest score (N,) of any wrong version of each image up to ``eps``.

        It is infinite for an image that no attack makes wrong. The clean image is a version, too.
        """
        versions = []
        for name in self._conditions(eps):
            scores = self.arrays[f"{name}/scores"][:, number]
            wrong = ~self.arrays[f"{name}/right"] & ~np.isnan(scores)
            versions.append(np.where(wrong, scores, np.inf))
        least: Array = np.min(versions, axis=0)
        return least

    def _figures(
        self, number: int, trial: Trial, fidelity: Mapping[str, Mapping[str, float]]
    ) -> DetectorFigures:
        detector = self.detectors[number]
        right, scores = (self.arrays[f"{trial.key}/{name}"] for name in ("right", "scores"))
        fooled = self.arrays["clean/right"] & ~right
        caught = self._caught(
            number,
            scores[fooled, number],
            (~right & (scores[:, number] <= self._threshold(number, self.rate))),
        )
        return DetectorFigures.model_validate(
            {
                "name": detector.name,
                "layer": detector.layer,
                "attack": trial.name,
                "eps": trial.eps,
                "fooled": int(fooled.sum()),
                "adaptive": self._adaptive(number, trial.eps, fidelity.get(key_of(detector), {})),
                **caught.as_json(),
            }
        )

    def _adaptive(
        self, number: int, eps: float, fidelity: Mapping[str, float]
    ) -> AdaptiveFigures | NotAttacked:
        detector = self.detectors[number]
        direct = any(target.detector is detector for target in self.targets)
        worst = self.least_suspicious(number, eps)
        limit = self._threshold(number, self.rate)
        clean = self.arrays["clean/scores"][:, number] <= limit
        held = self.arrays["clean/right"] & clean & (worst > limit)
        fooled = self.arrays["clean/right"] & np.isfinite(worst)
        names = {name for name, _ in self._attacks(eps, number)}
        figures = AdaptiveFigures.model_validate(
            {
                **self._caught(number, worst[fooled], worst <= limit).as_json(),
                "accuracy_with_guard": float(held.mean()),
                "attacks": sorted(names),
                "direct": direct,
            }
        )
        poor = [f"{value:.2f} on {kind} images" for kind, value in fidelity.items()
                if not value >= FIDELITY]  # fmt: skip
        if not direct:
            return NotAttacked(
                reason="only the best layer of a detector is attacked", upper_bound=figures
            )
        if poor:
            reason = f"its surrogate has a rank correlation of {' and '.join(poor)} with it"
            return NotAttacked(reason=reason, upper_bound=figures)
        return figures

    def _caught(self, number: int, attacked: Array, missed: Array) -> CaughtFigures:
        """Return the figures of a detector: scores ``attacked`` (M,), and misses (N,)."""
        honest = np.concatenate(
            [self.arrays[f"{name}/scores"][:, number] for name in ("clean", "noisy")]
        )
        truth = np.arange(len(honest) + len(attacked)) >= len(honest)
        limits = {rate: self._threshold(number, rate) for rate in _RATES}
        return CaughtFigures(
            auroc=auroc(truth, np.concatenate([honest, attacked])) if len(attacked) else None,
            tpr_at_fpr={
                f"{rate:g}": float((attacked > limit).mean())
                if len(attacked) and np.isfinite(limit)
                else None
                for rate, limit in limits.items()
            },
            undetected_and_wrong=float(missed.mean()),
        )

    def _threshold(self, number: int, rate: float) -> float:
        return threshold(self.calibration[:, number], rate)

    def _attacks(self, eps: float, number: int | None = None) -> list[tuple[str, str]]:
        """Return the name and the condition of every attack up to ``eps``.

        With ``number``, only those whose images the detector has scored.
        """
        found = [(trial.name, trial.key) for trial in self.trials if trial.eps <= eps]
        for target in self.targets:
            for name in self.adaptive:
                for budget in {trial.eps for trial in self.trials if trial.eps <= eps}:
                    key = adaptive_key(target.key, name, budget)
                    if f"{key}/right" in self.arrays:
                        found.append((f"{name} through {target.key}", key))
        if number is None:
            return found
        return [
            (name, key)
            for name, key in found
            if not np.isnan(self.arrays[f"{key}/scores"][:, number]).any()
        ]

    def _conditions(self, eps: float) -> list[str]:
        return ["clean", *(key for _, key in self._attacks(eps))]


def false_positives(
    flagged: Array,
    *,
    asked: float,
    patients: Array,
    labels: Array,
    classes: Sequence[str],
    sites: Array,
) -> FalsePositives:
    """Return the share of clean images that are ``flagged`` (N,), per class and per site too."""

    def rate(chosen: Array) -> RateFigures:
        hits = flagged[chosen]
        return RateFigures(
            images=len(hits),
            rate=float(hits.mean()) if len(hits) else None,
            interval=share_interval(hits, patients[chosen]),
        )

    return FalsePositives(
        asked=asked,
        classes={name: rate(labels == k) for k, name in enumerate(classes)},
        sites={str(site): rate(sites == site) for site in np.unique(sites[sites != ""])},
        **dict(rate(np.ones(len(flagged), dtype=bool))),
    )


def surrogate_fidelity(
    arrays: Arrays, targets: Sequence[Target], detectors: Sequence[Detector]
) -> dict[str, dict[str, float]]:
    """Return Spearman's correlation of each surrogate with its detector, clean and attacked.

    Detectors that are their own surrogates are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for target in targets:
        number = next(n for n, each in enumerate(detectors) if each is target.detector)
        pairs: dict[str, list[tuple[Array, Array]]] = {"clean": [], "attacked": []}
        for name, soft in arrays.items():
            condition, middle, key = name.partition("/soft/")
            if middle and key == target.key and condition != "noisy":
                kind = "clean" if condition == "clean" else "attacked"
                pairs[kind].append((soft, arrays[f"{condition}/scores"][:, number]))
        if pairs["clean"]:
            found[target.key] = {
                kind: spearman(*map(np.concatenate, zip(*parts, strict=True)))
                for kind, parts in pairs.items()
                if parts
            }
    return found


def spearman(first: Array, second: Array) -> float:
    """Return the rank correlation of two arrays (N,); ties have their mean rank. 0 if constant."""
    ranks = [_ranks(first), _ranks(second)]
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def rank_defence(arrays: Arrays, trials: Sequence[Trial]) -> list[RankDefence]:
    """Return how often the class at rank k, and the second best class, is the right answer.

    The images are those that are right when clean and that the attack fools.
    """
    labels, found = arrays["labels"], []
    for layer in (UNCENTRED, CENTRED):
        for trial in trials:
            if f"{trial.key}/{layer}/answer" not in arrays:
                continue
            fooled = arrays["clean/right"] & ~arrays[f"{trial.key}/right"]
            if fooled.any():
                answers = [arrays[f"{trial.key}/{name}"] for name in (f"{layer}/answer", "second")]
                previous, second = ((a == labels)[fooled].mean() for a in answers)
                found.append(
                    RankDefence(
                        layer=layer,
                        attack=trial.name,
                        eps=trial.eps,
                        previous_class=float(previous),
                        second_class=float(second),
                        images=int(fooled.sum()),
                    )
                )
    return found


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = ((ends - counts + ends - 1) / 2)[inverse]
    return ranks
