"""From arrays to the report: worst case, success rate and flags."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.evaluate import sanity
from medspark.evaluate.bootstrap import intervals
from medspark.evaluate.metrics import metrics
from medspark.evaluate.sanity import SanityConfig
from medspark.evaluate.summary import (
    Arrays,
    Detail,
    Trial,
    flags,
    joined,
    summarise,
    worst_cases,
)

LABELS = np.array([0, 0, 1, 1])
A1, A2, B1 = Trial("pgd", 20, 1 / 255), Trial("pgd", 20, 2 / 255), Trial("square", 100, 1 / 255)


def sure_of(ill: list[float]) -> np.ndarray:
    return np.stack([1 - np.array(ill), np.array(ill)], axis=1)


ARRAYS: Arrays = {
    "rows": np.arange(4),
    "labels": LABELS,
    "clean": sure_of([0.1, 0.6, 0.9, 0.8]),
    A1.key: sure_of([0.2, 0.7, 0.3, 0.8]),
    B1.key: sure_of([0.1, 0.6, 0.9, 0.4]),
    A2.key: sure_of([0.9, 0.9, 0.6, 0.6]),
}
TRIALS = [A1, A2, B1]


def right(probabilities: np.ndarray) -> list[bool]:
    return (probabilities.argmax(1) == LABELS).tolist()


def test_the_worst_case_is_wrong_where_any_attack_at_that_eps_or_below_is() -> None:
    (first, at_one), (second, at_two) = worst_cases(ARRAYS, TRIALS)

    assert (first.eps, second.eps) == (1 / 255, 2 / 255)
    assert right(at_one) == [True, False, False, False]
    assert right(at_two) == [False, False, False, False]


def test_the_report_counts_success_on_what_was_right() -> None:
    report = summarise(ARRAYS, TRIALS, limits=SanityConfig())

    assert report.clean.accuracy == 3 / 4
    assert [attack.success_rate for attack in report.attacks] == [1 / 3, 1 / 3, 1 / 3]
    assert [attack.accuracy for attack in report.worst_case] == [1 / 4, 0]
    assert report.worst_case[0].success_rate == 2 / 3


def test_answers_that_are_not_finite_are_told_in_a_sentence() -> None:
    lost = ARRAYS["clean"].copy()
    lost[1, 0] = np.nan

    with pytest.raises(RunError, match=f"answers 1 of {len(lost)} images .* not finite"):
        summarise(ARRAYS | {"clean": lost}, TRIALS, limits=SanityConfig())


def test_detail_adds_intervals_and_classes() -> None:
    detail = Detail(groups=np.array(["a", "a", "b", "b"]), samples=50, classes=("well", "ill"))

    report = summarise(ARRAYS, TRIALS, limits=SanityConfig(), detail=detail)

    document = report.as_json()
    assert document["clean"]["classes"][1]["name"] == "ill"
    low, high = document["attacks"][0]["intervals"]["accuracy"]
    assert low <= document["attacks"][0]["accuracy"] <= high
    assert "success_rate" in document["attacks"][0]["intervals"]
    assert set(document["attacks"][0]["classes"][1]["intervals"]) <= {
        "sensitivity", "specificity", "auroc",
    }  # fmt: skip


def test_parts_are_joined_in_the_order_of_the_rows_each_image_once() -> None:
    parts = [
        {name: values[chosen] for name, values in ARRAYS.items()} for chosen in ([2, 3], [0, 1, 2])
    ]

    whole = joined(parts)

    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(whole[name], values)


def triggered(arrays: Arrays, trials: list[Trial]) -> set[str]:
    return {flag.name for flag in flags(arrays, trials, SanityConfig()) if flag.triggered}


def test_a_black_box_that_does_more_harm_than_gradients_is_flagged() -> None:
    white, black = Trial("pgd", 20, 0.1), Trial("transfer", 20, 0.1)
    arrays = {**ARRAYS, white.key: ARRAYS["clean"], black.key: ARRAYS[A2.key]}

    assert triggered(arrays, [white, black]) == {"transfer_beats_white_box"}
    assert triggered({**arrays, white.key: ARRAYS[A2.key]}, [white, black]) == set()


def test_an_attack_that_does_less_harm_with_more_eps_is_flagged() -> None:
    arrays = {**ARRAYS, A2.key: ARRAYS["clean"]}

    assert triggered(arrays, [A1, A2]) == {"pgd_not_falling_with_eps"}


def test_images_outside_the_threat_model_are_flagged() -> None:
    arrays = {**ARRAYS, f"{A1.key}/outside": np.array([False, True, False, False])}

    assert triggered(arrays, [A1]) == {"attack_leaves_threat_model"}


def test_a_network_that_is_dead_for_many_images_is_flagged() -> None:
    arrays = {**ARRAYS, "clean": sure_of([0.7, 0.7, 0.7, 0.8])}

    assert "same_answer_for_many" in triggered(arrays, [])
    assert triggered(ARRAYS, []) == set()


def test_a_network_that_says_the_same_of_all_is_flagged_where_the_truth_differs() -> None:
    arrays = {**ARRAYS, "clean": sure_of([0.7, 0.6, 0.9, 0.8])}

    assert "same_class_for_all" in triggered(arrays, [])
    assert triggered({**arrays, "labels": np.ones(4, dtype=int)}, []) == set()


# Four images that are right when clean; each attack fools some of them.
RIGHT = {
    "rows": np.arange(4),
    "labels": LABELS,
    "clean": sure_of([0.1, 0.2, 0.9, 0.8]),
}


def fooled(*which: int) -> np.ndarray:
    """Return the probabilities of an attack that fools the images ``which``."""
    ill = np.array([0.15, 0.25, 0.85, 0.75])
    ill[list(which)] = 1 - ill[list(which)]
    return sure_of(list(ill))


def test_a_black_box_is_held_against_all_white_boxes_together() -> None:
    first, second = Trial("pgd", 20, 0.1), Trial("fgsm", 1, 0.1)
    black = Trial("square", 100, 0.1)
    arrays = {**RIGHT, first.key: fooled(0, 1), second.key: fooled(2, 3), black.key: fooled(0, 1)}

    found = {flag.name: flag for flag in flags(arrays, [first, second, black], SanityConfig())}

    assert found["square_beats_white_box"].value == 0 - 0.5
    assert not found["square_beats_white_box"].triggered


@given(st.permutations([1 / 255, 2 / 255, 4 / 255]))
def test_it_does_not_matter_in_which_order_budgets_are_given(order: list[float]) -> None:
    held = {1 / 255: fooled(0), 2 / 255: fooled(0, 1), 4 / 255: fooled(0, 1, 2)}
    trials = [Trial("pgd", 20, eps) for eps in order]
    arrays = {**RIGHT, **{trial.key: held[trial.eps] for trial in trials}}

    assert triggered(arrays, trials) == set()
    assert [trial.eps for trial, _ in worst_cases(arrays, trials)] == sorted(order)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.randoms())
def test_the_rise_is_the_largest_from_one_budget_to_the_next_and_from_clean(left, random) -> None:
    budgets = [(number + 1) / 255 for number in range(len(left))]
    trials = [Trial("pgd", 20, eps) for eps in random.sample(budgets, len(budgets))]
    held = dict(zip(budgets, left, strict=True))
    arrays = RIGHT | {trial.key: fooled(*range(4 - held[trial.eps])) for trial in trials}

    found = {flag.name: flag for flag in flags(arrays, trials, SanityConfig())}

    rises = [(after - before) / 4 for before, after in pairwise([4, *left])]
    assert found["pgd_not_falling_with_eps"].value == pytest.approx(max(rises))
    assert found["pgd_not_falling_with_eps"].triggered == (max(rises) > 0.02)


def test_a_sign_counts_above_its_threshold_and_not_at_it() -> None:
    limits = SanityConfig(zero_gradients=0.25, unsteady=0.5)
    quarter = {**RIGHT, "zero_gradient": np.array([True, False, False, False])}

    assert not sanity.zero_gradients(0.25, limits).triggered
    assert sanity.zero_gradients(0.26, limits).triggered
    assert {f.name: f.value for f in flags(quarter, [], limits)}["zero_gradients"] == 0.25


def doubted(**arrays: np.ndarray) -> dict[str, tuple[bool, float]]:
    """Return the flags of FGSM and PGD if the probes skipped one image."""
    trials = [Trial("fgsm", 1, 0.1), Trial("pgd", 20, 0.1), Trial("pgd", 20, 0.05)]
    looked_at = {
        "margin_held": np.array([1, 0, 0, np.nan]),
        "unsteady": np.array([0, 2e-3, 0, np.nan]),
        "noise": fooled(),
        "fgsm@25.5": fooled(),
        "pgd@25.5": fooled(2),
        "pgd@12.75": fooled(2),
    }
    found = flags({**RIGHT, **looked_at, **arrays}, trials, SanityConfig())
    return {flag.name: (flag.triggered, pytest.approx(flag.value)) for flag in found}


def test_the_checks_are_about_the_images_that_were_looked_at_alone() -> None:
    found = doubted()

    assert found["fgsm_far_above_margin_pgd"] == (True, 1 - 1 / 3)
    assert found["pgd_far_above_margin_pgd"] == (True, 2 / 3 - 1 / 3)
    assert found["answers_not_repeatable"] == (True, 2e-3)
    # Two of the three hold with as much of a lead as under noise.
    assert found["noise_as_strong_as_pgd"] == (True, 2 / 3)
    assert "noise_as_strong_as_fgsm" not in found  # where FGSM does not succeed it does no harm


def test_an_attack_that_takes_more_of_the_lead_than_noise_is_stronger_also_where_it_fails() -> None:
    weaker = sure_of([0.4, 0.4, 0.6, 0.6])

    assert doubted(**{"pgd@25.5": weaker})["noise_as_strong_as_pgd"] == (False, 0)
    assert doubted(**{"pgd@25.5": fooled(0, 1, 2)})["noise_as_strong_as_pgd"] == (False, 0)


def test_only_images_that_were_right_can_be_harmed_by_noise() -> None:
    wrong = {"clean": fooled(0), "pgd@25.5": fooled(0, 1, 2), "noise": fooled(0)}

    assert doubted(**wrong)["noise_as_strong_as_pgd"] == (False, 0)


def test_images_outside_of_any_attack_are_told_by_the_attack_with_the_most() -> None:
    outside = {
        f"{A1.key}/outside": np.array([False, True, True, False]),
        f"{A2.key}/outside": np.zeros(4, dtype=bool),
    }

    found = {flag.name: flag for flag in flags({**ARRAYS, **outside}, [A1, A2], SanityConfig())}

    assert found["attack_leaves_threat_model"].value == 0.5


def test_sizes_are_means_over_the_images() -> None:
    sizes = {
        f"{A1.key}/linf_255": np.array([1.0, 1.0, 0.0, 0.0]),
        f"{A1.key}/rms_255": np.array([1.0, 0.0, 0.0, 0.0]),
    }

    (result,) = summarise({**ARRAYS, **sizes}, [A1], limits=SanityConfig()).attacks

    assert (result.linf_255, result.rms_255) == (0.5, 0.25)


@pytest.mark.parametrize("positive", [0, 1])
def test_sensitivity_is_about_the_class_that_is_named(positive: int) -> None:
    detail = Detail(samples=40)
    report = summarise(ARRAYS, TRIALS, limits=SanityConfig(), positive=positive, detail=detail)

    assert report.clean.metrics == metrics(LABELS, ARRAYS["clean"], positive=positive).model_dump()
    attacked = metrics(LABELS, ARRAYS[A1.key], positive=positive)
    assert report.attacks[0].metrics == attacked.model_dump()
    assert report.clean.intervals["sensitivity"] == ((0.0, 1.0) if positive == 0 else (1.0, 1.0))


def test_intervals_are_drawn_as_often_by_the_groups_and_by_the_seed_that_are_given() -> None:
    def drawn(**chosen: object) -> dict[str, tuple[float, float]]:
        detail = Detail(**{"samples": 60} | chosen)
        return summarise(ARRAYS, TRIALS, limits=SanityConfig(), detail=detail).clean.intervals

    groups = np.array(["a", "a", "b", "b"])
    for chosen in ({}, {"seed": 3}, {"samples": 61}, {"groups": groups}):
        expected = {"samples": 60, "seed": 0} | chosen
        by = expected.pop("groups", np.arange(4))
        assert drawn(**chosen) == intervals(LABELS, ARRAYS["clean"], by, **expected)
    assert drawn(groups=groups)["accuracy"] != drawn()["accuracy"]


def test_every_class_gets_its_own_intervals() -> None:
    detail = Detail(samples=50, classes=("well", "ill"))
    report = summarise(ARRAYS, TRIALS, limits=SanityConfig(), detail=detail)
    drawn = intervals(LABELS, ARRAYS["clean"], np.arange(4), samples=50, per_class=True)

    for k, figures in enumerate(report.clean.classes):
        names = [name for name in drawn if name.endswith(f"/{k}")]
        assert figures.intervals == {name.removesuffix(f"/{k}"): drawn[name] for name in names}
    assert all("/" not in name for name in report.clean.intervals)


def test_answers_that_saturate_are_not_called_the_same() -> None:
    same = sure_of([0.7, 0.7, 0.7, 0.0])
    sure = sure_of([0.0, 0.0, 1.0, 1.0])

    found = {f.name: f.value for f in flags({**RIGHT, "clean": same}, [], SanityConfig())}
    assert found["same_answer_for_many"] == 2 / 4
    assert found["confidence_saturated"] == 0  # the only sure answer is wrong
    found = {f.name: f.value for f in flags({**RIGHT, "clean": sure}, [], SanityConfig())}
    assert (found["same_answer_for_many"], found["confidence_saturated"]) == (0, 1)


def test_the_share_of_the_same_class_is_of_the_images_of_the_others() -> None:
    labels, clean = np.array([0, 0, 0, 1, 1]), sure_of([0.1, 0.2, 0.3, 0.4, 0.9])
    arrays = {"rows": np.arange(5), "labels": labels, "clean": clean}

    found = {flag.name: flag.value for flag in flags(arrays, [], SanityConfig())}

    assert found["same_class_for_all"] == 1 / 2


def test_arrays_are_called_as_in_the_pieces_of_earlier_versions() -> None:
    names = [Trial("pgd", 20, eps).key for eps in (0.0, 0.5 / 255, 2 / 255, 0.05)]

    assert names == ["pgd@0", "pgd@0.5", "pgd@2", "pgd@12.75"]
