"""The figures: adaptive beside oblivious, the worst per image, and what cannot be built."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr
from small_world import EPS, OBLIVIOUS, World

from medspark.defend.detect.adaptive import Target
from medspark.defend.detect.conformal import share_interval, threshold
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.examine import adaptive_key
from medspark.defend.detect.figures import (
    Scores,
    false_positives,
    spearman,
    surrogate_fidelity,
)
from medspark.defend.detect.result import AdaptiveFigures, DetectorFigures, NotAttacked
from medspark.evaluate.summary import Trial

CAUGHT = {"auroc": 0.9, "tpr_at_fpr": {"0.05": 0.8}, "undetected_and_wrong": 0.2}
ADAPTIVE = AdaptiveFigures(
    auroc=0.1, tpr_at_fpr={"0.05": 0.0}, undetected_and_wrong=0.7, accuracy_with_guard=0.3,
    attacks=("pgd", "selective"), direct=True,
)  # fmt: skip
HEAD = {"name": "kde", "layer": "logits", "attack": "pgd", "eps": EPS, "fooled": 5}


def test_oblivious_figures_alone_cannot_be_built() -> None:
    with pytest.raises(ValidationError, match="adaptive"):
        DetectorFigures.model_validate(HEAD | CAUGHT)
    with pytest.raises(ValidationError, match="reason"):
        NotAttacked(reason="")
    with pytest.raises(ValidationError, match="attacks"):
        AdaptiveFigures.model_validate(ADAPTIVE.as_json() | {"attacks": []})

    DetectorFigures.model_validate(HEAD | CAUGHT | {"adaptive": ADAPTIVE})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attacks": ("selective",)}, "leave out the attack pgd"),
        ({"undetected_and_wrong": 0.1}, "better than the oblivious"),
    ],
)
@pytest.mark.parametrize("bound", [False, True])
def test_adaptive_figures_that_leave_out_the_oblivious_attack_cannot_be_built(
    change, sentence, bound
) -> None:
    adaptive = ADAPTIVE.model_copy(update=change)
    given = NotAttacked(reason="r", upper_bound=adaptive) if bound else adaptive

    with pytest.raises(ValidationError, match=sentence):
        DetectorFigures.model_validate(HEAD | CAUGHT | {"adaptive": given})


def test_the_worst_of_an_image_is_its_least_suspicious_wrong_version(world: World) -> None:
    scores = world.scores()
    arrays, conditions = scores.arrays, [c[:-6] for c in scores.arrays if c.endswith("/right")]

    for number in range(len(world.detectors)):
        worst = scores.least_suspicious(number, EPS)
        for row in range(len(worst)):
            wrong = [
                arrays[f"{name}/scores"][row, number]
                for name in conditions
                if name != "noisy" and not arrays[f"{name}/right"][row]
            ]
            assert worst[row] == min(wrong, default=np.inf)


def test_adaptive_attacks_miss_more_than_oblivious_ones_and_say_which_they_are(world) -> None:
    for figures in world.scores().figures():
        adaptive = figures.adaptive
        direct = isinstance(adaptive, AdaptiveFigures)
        worst = adaptive if direct else adaptive.upper_bound
        assert worst.undetected_and_wrong >= figures.undetected_and_wrong
        assert {"fgsm", "pgd"} < set(worst.attacks)
        if direct:
            assert f"selective through {figures.name}:{figures.layer}" in worst.attacks
            assert worst.undetected_and_wrong > figures.undetected_and_wrong


def test_only_targets_have_figures_of_their_own_and_others_an_upper_bound(world: World) -> None:
    targets = {target.key for target in world.choice.targets}

    for figures in world.scores().figures():
        own = isinstance(figures.adaptive, AdaptiveFigures)
        if f"{figures.name}:{figures.layer}" in targets:
            assert own or "surrogate" in figures.adaptive.reason
        else:
            assert not own


def test_a_detector_with_a_poor_surrogate_is_reported_as_not_attacked(world: World) -> None:
    arrays = dict(world.examined)
    for name in list(arrays):
        if "/soft/safetynet" in name and not name.startswith("clean"):
            arrays[name] = arrays[name][::-1]

    found = [f for f in world.scores(arrays).figures() if f.name == "safetynet"]

    reasons = {f.adaptive.reason for f in found if f.layer == "penultimate"}
    assert len(reasons) == 1
    assert "surrogate has a rank correlation of" in reasons.pop()


def test_the_surrogates_of_the_small_world_order_images_as_their_detectors(world: World) -> None:
    found = surrogate_fidelity(world.examined, world.choice.targets, world.detectors)

    assert set(found) == {"safetynet:penultimate", "combination:all"}
    assert min(value for kinds in found.values() for value in kinds.values()) >= 0.9


def test_a_rank_correlation_is_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, (2, 60))

    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(first, np.zeros(60)) == 0


def test_a_rate_needs_a_threshold_and_too_few_validation_images_give_none(world: World) -> None:
    few = world.scores(calibration=world.choice.calibration[:50])

    figures = few.figures()[0]

    assert figures.tpr_at_fpr["0.01"] is None
    assert figures.tpr_at_fpr["0.05"] is not None


def test_without_a_guard_every_wrong_image_passes(world: World) -> None:
    scores = world.scores()
    wrong = scores.wrong_under(EPS).mean()

    for figures in scores.figures():
        adaptive = figures.adaptive
        worst = adaptive if isinstance(adaptive, AdaptiveFigures) else adaptive.upper_bound
        assert worst.undetected_and_wrong <= wrong


def test_false_positives_are_counted_per_class_and_per_site() -> None:
    flagged = np.array([True, False, False, True, False, False])
    found = false_positives(
        flagged,
        asked=0.05,
        patients=np.arange(6),
        labels=np.array([0, 0, 0, 1, 1, 1]),
        classes=("a", "b"),
        sites=np.array(["x", "x", "", "y", "y", "y"]),
    )

    assert (found.rate, found.images) == (1 / 3, 6)
    assert {name: rate.rate for name, rate in found.sites.items()} == {"x": 0.5, "y": 1 / 3}
    assert found.classes["a"].interval[0] < 1 / 3 < found.classes["a"].interval[1]
    assert [trial.eps for trial in OBLIVIOUS.trials()] == [EPS, EPS]


def test_the_asked_rate_is_within_the_interval_of_the_rate_that_is_reached(world: World) -> None:
    calibration = world.choice.calibration
    clean = world.examined["clean/scores"]

    for number in range(len(world.detectors)):
        flagged = clean[:, number] > threshold(calibration[:, number], 0.05)
        low, high = share_interval(flagged, np.arange(len(flagged)))
        assert low <= 0.05 <= high


@given(st.integers(0, 1000))
def test_a_larger_budget_holds_the_attacks_of_a_smaller_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    trials = [Trial("pgd", 1, eps / 255) for eps in (1, 2, 4)]
    target = Target(Detector("a"), 0.0, 1.0)
    keys = ["clean", *(trial.key for trial in trials),
            *(adaptive_key(target.key, "selective", trial.eps) for trial in trials)]  # fmt: skip
    arrays = {f"{key}/scores": generator.normal(size=(9, 1)) for key in keys}
    arrays |= {f"{key}/right": generator.random(9) < 0.5 for key in keys}
    scores = Scores(
        arrays, [target.detector], [target], trials, ["selective"], np.zeros((9, 1)), 0.1
    )

    least = [scores.least_suspicious(0, trial.eps) for trial in trials]

    assert (least[0] >= least[1]).all()
    assert (least[1] >= least[2]).all()
    wrong = [scores.wrong_under(trial.eps) for trial in trials]
    assert (wrong[0] <= wrong[1]).all()
    assert (wrong[1] <= wrong[2]).all()
    assert np.array_equal(np.isfinite(least[2]), wrong[2])
