"""Recalibration to a site: the draw, the fit, its intervals, and the tests of disagreement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.decision import probability
from medspark.evaluate.recalibrate import (
    Goal,
    Sample,
    differ,
    draw,
    fit,
    images_needed,
    interval,
    judge,
    miscalibrated,
)
from medspark.models.card import Rate

YOUDEN, SENSITIVE = Goal("youden"), Goal("sensitivity", 0.9)


def site_of(count: int, *, seed: int, slope: float = 1.0, shift: float = 0.0) -> Sample:
    """Return images, one of each patient, that are positive with sigmoid(slope score + shift)."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 3, count)
    positive = random.random(count) < probability(slope * scores + shift)
    return Sample(positive, np.arange(count).astype(str), scores, scores)


@given(
    patients=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_whole_patients_are_drawn_and_none_of_them_is_left(patients, share, seed: int) -> None:
    keys = np.array(patients)
    count = max(1, round(share * len(keys)))

    rows, rest = draw(keys, count, seed=seed)

    assert len(rows) == len(set(rows)) == count
    assert not set(keys[rows]) & set(keys[rest])
    cut = [k for k in set(keys[rows]) if (keys[rows] == k).sum() < (keys == k).sum()]
    assert len(cut) <= 1


def test_another_seed_draws_other_patients() -> None:
    drawn = {tuple(draw(np.arange(100), 5, seed=seed)[0]) for seed in range(20)}

    assert len(drawn) == 20


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, 2.0), (1.5, -2.0)])
def test_the_fit_finds_the_cut_that_the_labels_were_drawn_at(slope: float, shift: float) -> None:
    site = site_of(4000, seed=1, slope=slope, shift=shift)
    share = site.positive.mean()
    wanted = (np.log(share / (1 - share)) - shift) / slope

    assert fit(site, YOUDEN, temperature=1.0).cut == pytest.approx(wanted, abs=0.35)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    site = site_of(20_000, seed=2, slope=1 / temperature)

    found = fit(site, YOUDEN, temperature=1.0)

    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.threshold == pytest.approx(probability(found.cut / found.temperature))


def test_fifty_images_of_a_place_like_the_old_one_move_the_temperature_little() -> None:
    found = [fit(site_of(50, seed=seed), YOUDEN, temperature=1.0) for seed in range(20)]

    assert np.median([each.temperature for each in found]) == pytest.approx(1, abs=0.15)
    assert np.ptp([each.temperature for each in found]) < 1.5


@given(st.integers(0, 50))
def test_images_that_the_scores_separate_do_not_make_the_fit_infinitely_sure(seed: int) -> None:
    site = site_of(20, seed=seed, slope=1.0)
    positive = site.scores > np.median(site.scores)

    found = fit(replace(site, positive=positive), YOUDEN, temperature=1.0)

    assert 0.2 < found.temperature < 5
    assert site.scores.min() < found.cut < site.scores.max()


def test_the_fitted_cut_varies_less_than_the_quantile_of_the_sample() -> None:
    whole = site_of(20_000, seed=3)
    true = np.quantile(whole.scores[whole.positive], 0.1)

    fitted, counted = [], []
    for seed in range(40):
        site = site_of(50, seed=100 + seed)
        fitted.append(fit(site, SENSITIVE, temperature=1.0).cut)
        counted.append(np.quantile(site.scores[site.positive], 0.1))

    assert np.square(np.array(fitted) - true).mean() < np.square(np.array(counted) - true).mean()


def test_with_many_images_the_labels_decide_where_no_logistic_curve_fits() -> None:
    site = site_of(5000, seed=4)
    positive = np.abs(site.scores - 1) < 2  # positives in the middle

    cut = fit(replace(site, positive=positive), SENSITIVE, temperature=1.0).cut

    assert (site.scores >= cut)[positive].mean() == pytest.approx(0.9, abs=0.06)


def test_a_sample_of_one_class_is_refused() -> None:
    site = site_of(20, seed=5)

    with pytest.raises(ValueError, match="one class only"):
        fit(replace(site, positive=np.ones(20, dtype=bool)), YOUDEN, temperature=1.0)


def test_the_rates_of_a_judged_site_are_those_of_images_it_has_not_seen() -> None:
    rest = site_of(20_000, seed=6, shift=1.5)
    held = []
    for seed in range(30):
        site = judge(
            site_of(50, seed=200 + seed, shift=1.5), YOUDEN, temperature=1.0, resamples=0, seed=0
        )
        true = (rest.scores >= site.fit.cut)[rest.positive].mean()
        low, high = interval(site.sensitivity)
        held.append(low <= true <= high)

    assert np.mean(held) >= 0.85


def test_the_intervals_of_the_fit_hold_it_and_shrink_with_the_sample() -> None:
    few, many = (
        judge(site_of(count, seed=7), YOUDEN, temperature=1.0, resamples=50, seed=0)
        for count in (50, 800)
    )

    for site in (few, many):
        assert site.temperature[0] < site.fit.temperature < site.temperature[1]
        assert site.threshold[0] < site.fit.threshold < site.threshold[1]
    assert np.ptp(many.temperature) < np.ptp(few.temperature)
    assert np.ptp(many.threshold) < np.ptp(few.threshold)


def test_a_patients_images_are_judged_without_that_patient() -> None:
    site = site_of(40, seed=8)
    twice = Sample(*(np.tile(part, 2) for part in (site.positive, site.patients)),
                   *(np.tile(part, 2) for part in (site.clean, site.scores)))  # fmt: skip

    found = judge(twice, YOUDEN, temperature=1.0, resamples=0, seed=0)

    assert found.sensitivity.right % 2 == 0  # both copies have the same answer
    assert found.sensitivity.design_effect == pytest.approx(2, rel=0.1)


def test_one_patient_with_many_images_of_another_kind_is_judged_by_the_others() -> None:
    """The others' cut lies near 0; with the patient's 20 negatives it would lie above 1."""
    others = np.concatenate([np.linspace(-4, -2, 10), np.linspace(2, 4, 10)])
    scores = np.concatenate([others, np.linspace(0.8, 1.2, 20)])
    positive = np.arange(40) // 10 == 1
    patients = np.array([*map(str, range(20)), *["one"] * 20])
    sample = Sample(positive, patients, scores, scores)

    found = judge(sample, YOUDEN, temperature=1.0, resamples=0, seed=0)

    assert fit(sample, YOUDEN, temperature=1.0).cut > 1.2
    assert found.specificity.right == 10
    assert found.sensitivity.right == 10


def test_the_images_needed_give_the_width_they_promise() -> None:
    rate = Rate(right=45, images=50)
    share = 0.25

    needed = images_needed(rate, share=share)

    centre = (45 + 1.92) / (50 + 3.84)
    low, high = interval(Rate(right=round(centre * needed * share), images=round(needed * share)))
    assert (high - low) / 2 == pytest.approx(0.05, rel=0.05)
    assert images_needed(Rate(right=50, images=50), share=1) > 0
    assert images_needed(rate.model_copy(update={"design_effect": 2.0}), share=share) > needed


def test_rates_differ_by_chance_or_by_more() -> None:
    old = Rate(right=190, images=200)

    assert differ(old, Rate(right=19, images=20)) > 0.5
    assert differ(old, Rate(right=12, images=20)) < 0.001
    # Five images each of four patients are worth little more than four images.
    assert differ(old, Rate(right=12, images=20, design_effect=5.0)) > 0.01


def test_the_calibration_test_keeps_its_level_and_notices_a_shift() -> None:
    fine = [miscalibrated(site_of(60, seed=seed), temperature=1.0) for seed in range(200)]
    moved = [miscalibrated(site_of(60, seed=s, shift=2.0), temperature=1.0) for s in range(50)]

    assert np.mean(np.array(fine) < 0.05) < 0.12
    assert np.mean(np.array(moved) < 0.05) > 0.8
