"""Detectors are fitted on some images, chosen on others, and calibrated on yet others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_world import OBLIVIOUS, World

from medspark.defend.detect.choose import choose, score_all, training_of
from medspark.defend.detect.gather import right, rows_of
from medspark.defend.detect.generalise import generalisation
from medspark.defend.detect.pieces import drawn_rows
from medspark.errors import UsageError
from medspark.evaluate.metrics import auroc

TRIALS = OBLIVIOUS.trials()


@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 200), st.integers(0, 9))
def test_reference_and_contrast_share_no_image(total, first, second, seed) -> None:
    reference = drawn_rows(total, first, seed=seed)
    contrast = drawn_rows(total, second, seed=seed, after=first)

    both = np.concatenate([reference, contrast])
    assert len(np.unique(both)) == len(both) == min(total, first + second)
    assert both.size == 0 or (both.min() >= 0 and both.max() < total)


def test_attacked_training_images_are_those_that_the_attack_turns_wrong(world: World) -> None:
    training = world.training

    assert len(training.attacked) == len({trial.name for trial in TRIALS})
    assert sum(len(features.logits) for features in training.attacked) >= 10
    assert torch.equal(training.reference.predicted, training.labels)
    assert len(training.clean.logits) == len(training.noisy.logits)


def test_an_attack_that_fools_too_few_images_is_one_sentence(world: World) -> None:
    few = rows_of(world.validation, np.arange(4))

    with pytest.raises(UsageError, match=r"fit.attacks: they fool \d of the training images"):
        training_of(world.validation, few, TRIALS, head=None, seed=0)


def test_the_choice_is_the_highest_auroc_on_the_choosing_half_alone(world: World) -> None:
    choosing = world.choosing
    was_right = right(choosing, "clean")

    for number, (key, mean) in enumerate(world.choice.auroc.items()):
        detector = world.detectors[number]
        honest = [score_all([detector], choosing, c)[:, 0] for c in ("clean", "noisy")]
        areas = []
        for trial in TRIALS:
            fooled = (was_right & ~right(choosing, trial.key)).numpy()
            attacked = score_all([detector], choosing, trial.key)[fooled, 0]
            scores = np.concatenate([*honest, attacked])
            areas.append(auroc(np.arange(len(scores)) >= 200, scores))
        assert mean == pytest.approx(np.mean(areas)), key
    assert world.choice.chosen == int(np.argmax(list(world.choice.auroc.values())))


def test_calibration_is_clean_images_of_the_other_half(world: World) -> None:
    expected = score_all(world.detectors, world.calibrating, "clean")

    assert np.array_equal(world.choice.calibration, expected)


def test_the_choice_does_not_depend_on_the_calibrating_images_which_nobody_attacks(world) -> None:
    clean = {
        name: values[::2]
        for name, values in world.calibrating.items()
        if name.startswith("clean/") or "/" not in name
    }

    again = choose(world.detectors, world.choosing, clean, TRIALS)

    assert again.auroc == world.choice.auroc


def test_targets_are_the_best_layer_of_each_detector(world: World) -> None:
    best: dict[str, float] = {}
    for key, area in world.choice.auroc.items():
        name = key.partition(":")[0]
        best[name] = max(best.get(name, 0), area)

    for target in world.choice.targets:
        assert world.choice.auroc[target.key] == best[target.detector.name]
    assert len(world.choice.targets) == len(best)


def test_each_attack_is_left_out_in_turn_and_only_what_learns_is_listed(world: World) -> None:
    found = generalisation(
        [("kde", "logits"), ("safetynet", "penultimate")],
        rows_of(world.validation, world.half),
        rows_of(world.validation, ~world.half),
        world.validation,
        TRIALS,
        head=None,
        seed=0,
    )

    assert {each.left_out for each in found} == {"fgsm", "pgd"}
    assert {each.name for each in found} == {"safetynet", "combination"}
    assert all(0.5 < each.auroc <= 1 for each in found)


def test_each_budget_is_left_out_in_turn(world: World) -> None:
    arrays = {
        name.replace("@38", "@19"): values for name, values in world.validation.items()
    } | world.validation
    trials = [*TRIALS, *(replace(trial, eps=trial.eps / 2) for trial in TRIALS)]

    found = generalisation(
        [("safetynet", "penultimate")],
        rows_of(arrays, world.half), rows_of(arrays, ~world.half), arrays, trials,
        head=None, seed=0,
    )  # fmt: skip

    assert {each.left_out for each in found} == {"fgsm", "pgd", "eps 38/255", "eps 19/255"}


def test_what_is_left_out_is_not_learnt(world: World, monkeypatch) -> None:
    learnt: list[set[str]] = []
    monkeypatch.setattr(
        "medspark.defend.detect.generalise.training_of",
        lambda _r, _c, trials, **_: learnt.append({t.name for t in trials}) or world.training,
    )

    generalisation([("kde", "logits")], {}, {}, world.validation, TRIALS, head=None, seed=0)

    assert learnt == [{"fgsm", "pgd"}, {"pgd"}, {"fgsm"}]
