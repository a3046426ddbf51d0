"""Split-conformal p-values bound the rate of false positives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.defend.detect.conformal import needed, p_values, share_interval, threshold

SCORES = st.lists(st.integers(0, 9), min_size=2, max_size=25)
RATES = st.sampled_from([0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9])


@given(SCORES, RATES)
def test_of_exchangeable_scores_no_larger_share_than_the_rate_is_flagged(scores, rate):
    # Each score in turn is the new image and the others are the calibration: with ties as well,
    # the share that is flagged is at most the rate.
    values = np.array(scores)
    flagged = [
        p_values(values[i : i + 1], np.delete(values, i))[0] <= rate for i in range(len(values))
    ]

    assert np.mean(flagged) <= rate + 1e-9


@given(SCORES, RATES, st.integers(-1, 10))
def test_a_score_beyond_the_threshold_is_one_with_a_small_p_value(scores, rate, score):
    calibration = np.array(scores)

    beyond = score > threshold(calibration, rate)

    assert beyond == (p_values(np.array([score]), calibration)[0] <= rate + 1e-12)


def test_a_p_value_counts_equal_scores_as_at_least_as_suspicious():
    assert p_values(np.array([2.0, 9.0, 0.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        [3 / 4, 1 / 4, 1]
    )


@pytest.mark.parametrize(("rate", "images"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1)])
def test_a_rate_needs_so_many_images_and_with_one_less_nothing_is_flagged(rate, images):
    assert needed(rate) == images
    assert threshold(np.arange(images), rate) == images - 1
    assert math.isinf(threshold(np.arange(images - 1), rate))


def test_continuous_scores_are_flagged_at_the_rate_itself_on_average():
    generator = np.random.default_rng(0)
    rates = [
        (generator.normal(size=200) > threshold(generator.normal(size=99), 0.05)).mean()
        for _ in range(400)
    ]

    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)


def test_an_interval_holds_the_share_and_counts_patients_not_images():
    hits, patients = np.arange(40) < 4, np.arange(40) // 4

    low, high = share_interval(hits, np.arange(40))
    wide_low, wide_high = share_interval(hits, patients)

    assert wide_low < low < 0.1 < high < wide_high
    assert share_interval(np.zeros(20, bool), np.arange(20))[1] > 0.1
    assert share_interval(np.zeros(0, bool), np.arange(0)) == (0.0, 1.0)
