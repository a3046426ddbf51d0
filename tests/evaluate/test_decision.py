"""The operating point: laws of the chosen cut, net benefit by hand, intervals of shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medspark.evaluate.decision import (
    best_cut,
    count_at,
    design_effect,
    net_benefit,
    probability,
    rates_at,
    wilson,
)

TARGETS = st.sampled_from([0.01, 0.5, 0.8, 0.9, 0.95, 1.0])


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Return scores, many of them tied, and whether each image is positive; both classes occur."""
    count = draw(st.integers(2, 40))
    scores = draw(arrays.arrays(np.float64, count, elements=st.integers(-5, 5).map(float)))
    positive = draw(arrays.arrays(np.bool_, count))
    positive[:2] = [True, False]
    return scores, positive


def others(scores: np.ndarray) -> np.ndarray:
    """Return a cut in every gap between the scores, and beyond both ends."""
    levels = np.unique(scores)
    return np.concatenate([[levels[0] - 1], (levels[1:] + levels[:-1]) / 2, [levels[-1] + 1]])


@given(scored(), TARGETS)
def test_the_cut_finds_enough_positives_and_no_larger_one_does(images, target: float) -> None:
    scores, positive = images
    cut = best_cut(scores, positive, criterion="sensitivity", target=target)

    assert count_at(scores, positive, cut).sensitivity >= target
    for larger in others(scores)[others(scores) > cut]:
        assert count_at(scores, positive, larger).sensitivity < target


@given(scored(), TARGETS)
def test_the_cut_spares_enough_negatives_and_no_smaller_one_does(images, target: float) -> None:
    scores, positive = images
    cut = best_cut(scores, positive, criterion="specificity", target=target)

    assert count_at(scores, positive, cut).specificity >= target
    for smaller in others(scores)[others(scores) < cut]:
        assert count_at(scores, positive, smaller).specificity < target


@given(scored())
def test_no_cut_has_a_larger_sum_of_sensitivity_and_specificity(images) -> None:
    scores, positive = images

    def youden(cut: float) -> float:
        counts = count_at(scores, positive, cut)
        return counts.sensitivity + counts.specificity

    cut = best_cut(scores, positive, criterion="youden")

    assert youden(cut) >= max(map(youden, others(scores))) - 1e-9


@given(scored(), st.sampled_from(["sensitivity", "specificity", "youden"]))
def test_no_score_lies_on_the_cut_so_that_rounding_changes_no_call(images, criterion) -> None:
    scores, positive = images

    cut = best_cut(scores, positive, criterion=criterion, target=0.9)

    assert np.abs(scores - cut).min() >= 0.5


@given(scored(), st.sampled_from(["sensitivity", "specificity", "youden"]))
def test_the_cut_moves_with_the_scores(images, criterion) -> None:
    scores, positive = images
    cut = best_cut(scores, positive, criterion=criterion, target=0.9)

    assert best_cut(2 * scores + 6, positive, criterion=criterion, target=0.9) == pytest.approx(
        2 * cut + 6,
        abs=1.01,  # beyond the last score the cut keeps its distance of 1
    )


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_images_of_one_class_are_refused(positive: list[bool]) -> None:
    with pytest.raises(ValueError, match="one class only"):
        best_cut(np.array([0.0, 1.0]), np.array(positive), criterion="youden")


def test_probabilities_may_take_the_place_of_labels() -> None:
    scores = np.linspace(-3, 3, 601)

    cut = best_cut(scores, probability(scores - 1), criterion="youden")

    share = probability(scores - 1).mean()
    assert cut == pytest.approx(1 + np.log(share / (1 - share)), abs=0.01)


def test_net_benefit_is_true_minus_weighted_false_positives() -> None:
    likely, positive = np.array([0.9, 0.6, 0.3, 0.1]), np.array([True, False, True, False])

    benefit = net_benefit(likely, positive, np.array([0.2, 0.5, 0.95]))

    assert benefit == pytest.approx([2 / 4 - 1 / 4 * 0.25, 1 / 4 - 1 / 4, 0])


@given(scored(), st.floats(0.01, 0.99))
def test_no_model_has_more_net_benefit_than_one_that_is_always_right(images, at: float) -> None:
    scores, positive = images
    threshold = np.array([at])

    assert net_benefit(probability(scores), positive, threshold) <= positive.mean() + 1e-12
    assert net_benefit(positive.astype(float), positive, threshold) == pytest.approx(
        positive.mean()
    )


def test_the_score_interval_is_that_of_the_textbook() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


def test_images_of_one_patient_that_always_agree_count_once() -> None:
    hits = np.repeat([True, True, False, True, False, False], 5)
    patients = np.repeat(np.arange(6), 5)

    assert design_effect(hits, patients) == pytest.approx(29 / 5)  # 5 for many patients
    assert design_effect(hits[::5], patients[::5]) == pytest.approx(1)
    assert design_effect(np.ones(4, dtype=bool), np.arange(4)) == 1


@given(scored())
def test_rates_are_the_counts_at_the_cut(images) -> None:
    scores, positive = images
    found, spared = rates_at(scores, positive, 0.5, np.arange(len(scores)))

    counts = count_at(scores, positive, 0.5)
    assert (found.right, found.images) == (counts.found, counts.positives)
    assert (spared.right, spared.images) == (counts.spared, counts.negatives)
