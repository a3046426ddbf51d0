"""Each rule does what its paper says, on arrays small enough to work out by hand or otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN

from medspark.federate.aggregate import aggregate
from medspark.federate.aggregate.bulyan import Bulyan
from medspark.federate.aggregate.centered_clipping import CenteredClipping
from medspark.federate.aggregate.fedadam import FedAdam
from medspark.federate.aggregate.fedavg import FedAvg
from medspark.federate.aggregate.fedavgm import FedAvgM
from medspark.federate.aggregate.fedyogi import FedYogi
from medspark.federate.aggregate.flame import Flame, tight_majority
from medspark.federate.aggregate.fltrust import FLTrust
from medspark.federate.aggregate.foolsgold import FoolsGold
from medspark.federate.aggregate.krum import Krum, MultiKrum
from medspark.federate.aggregate.norm_clipping import NormClipping
from medspark.federate.aggregate.rfa import GeometricMedian
from medspark.federate.aggregate.rlr import RobustLearningRate
from medspark.federate.aggregate.trimmed_mean import TrimmedMean
from medspark.federate.aggregate.weak_dp import WeakDP


def line(*values: float) -> np.ndarray:
    """Return updates of one weight each."""
    return np.array(values)[:, None]


def test_fedavgm_goes_on_with_part_of_the_last_change():
    rule = FedAvgM(momentum=0.5, rate=2.0)

    first = aggregate(rule, line(1, 3))
    second = aggregate(rule, line(1, 1), state=first.state)

    assert (first.change[0], second.change[0]) == (4.0, 2 * (0.5 * 2 + 1))


@pytest.mark.parametrize(
    ("kind", "second"), [(FedAdam, 0.9 * 0.01 + 0.1 * 4), (FedYogi, 0.01 + 0.1 * 4)]
)
def test_fedadam_and_fedyogi_follow_the_paper(kind: type[FedAdam], second: float):
    rule = kind(rate=0.5, beta1=0.6, beta2=0.9, tau=0.1)

    outcome = aggregate(rule, line(1, 3))

    assert outcome.change[0] == pytest.approx(0.5 * 0.4 * 2 / (np.sqrt(second) + 0.1))
    assert outcome.state["second"][0] == pytest.approx(second)


def test_fedyogi_forgets_a_large_square_slowly():
    state = {"first": np.zeros(1), "second": np.full(1, 4.0)}

    yogi = aggregate(FedYogi(beta2=0.9), line(1), state=state).state["second"][0]

    assert yogi == pytest.approx(4 - 0.1 * 1)


@pytest.mark.parametrize(("trim", "kept"), [(0.0, (0, 5)), (0.2, (1, 4)), (0.39, (1, 4))])
def test_the_trimmed_mean_cuts_the_share_rounded_down(trim: float, kept: tuple[int, int]):
    values = (9.0, -4.0, 1.0, 2.0, 100.0)

    mean = aggregate(TrimmedMean(trim=trim), line(*values)).change[0]

    assert mean == pytest.approx(np.mean(sorted(values)[slice(*kept)]))


def test_29_of_100_are_cut_at_29_percent():
    assert TrimmedMean(trim=0.29).cut(100) == 29


@pytest.mark.parametrize(
    ("convention", "picked"),
    # n = 5, f = 1. Two neighbours: 0 and 3 are nearest to 1. Three: the far one has to be borne.
    [("blanchard", 1.0), ("allouah", 2.0)],
)
def test_the_two_conventions_of_krum_pick_different_clients(convention: str, picked: float):
    rule = Krum(adversaries=1, convention=convention)

    outcome = aggregate(rule, line(0.0, 1.0, 2.0, 3.9, 4.2))

    assert outcome.change[0] == picked
    assert len(outcome.rejected or ()) == 4


@pytest.mark.parametrize(("convention", "kept"), [("blanchard", 7), ("allouah", 9)])
def test_multi_krum_keeps_as_many_as_its_convention_says(convention: str, kept: int):
    updates = honest(1, 11)

    outcome = aggregate(MultiKrum(adversaries=2, convention=convention), updates)

    stay = [i for i in range(11) if i not in (outcome.rejected or ())]
    assert len(stay) == kept
    assert np.allclose(outcome.change, updates[stay].mean(axis=0), atol=1e-6)


@given(seeds)
def test_bulyan_is_the_mean_of_the_values_nearest_to_the_median_of_its_choice(seed: int):
    updates = honest(seed, 11).astype(np.float64)
    outcome = aggregate(Bulyan(adversaries=2), updates)
    picked = updates[[i for i in range(11) if i not in (outcome.rejected or ())]]
    nearest = np.argsort(np.abs(picked - np.median(picked, axis=0)), axis=0)[:3]

    assert len(picked) == 7
    assert np.allclose(outcome.change, np.take_along_axis(picked, nearest, 0).mean(axis=0))


@given(seeds, st.integers(0, 4))
def test_no_point_near_the_geometric_median_is_nearer_to_all_updates(seed: int, liars: int):
    updates = honest(seed, 11).astype(np.float64)
    updates[:liars] *= -50
    found = aggregate(GeometricMedian(), updates).change

    def far(point: np.ndarray) -> float:
        return float(np.linalg.norm(updates - point, axis=1).sum())

    steps = np.random.default_rng(seed).normal(size=(20, 6)) * 1e-3
    assert all(far(found) <= far(found + step) + 1e-9 for step in steps)


@given(seeds)
def test_the_geometric_median_counts_images(seed: int):
    updates, counts = honest(seed, 6), np.array([3.0, 1, 1, 2, 1, 1])

    counted = aggregate(GeometricMedian(), updates, counts=counts).change
    repeated = aggregate(GeometricMedian(), np.repeat(updates, counts.astype(int), axis=0)).change

    assert np.allclose(counted, repeated, atol=1e-6)


@given(seeds, st.integers(1, 4))
def test_centered_clipping_follows_its_equation(seed: int, iterations: int):
    updates, centre = honest(seed, 7).astype(np.float64), np.full(6, 0.1)
    rule = CenteredClipping(radius=0.5, iterations=iterations, bucket=1)
    expected = centre
    for _ in range(iterations):
        away = updates - expected
        scale = np.minimum(1, 0.5 / np.linalg.norm(away, axis=1))
        expected = expected + (scale[:, None] * away).mean(axis=0)

    found = aggregate(rule, updates, references={"centre": centre}).change

    assert np.allclose(found, expected, atol=1e-9)


@given(seeds, st.integers(0, 9))
def test_bucketing_clips_the_means_of_pairs_drawn_anew_each_round(seed: int, round: int):
    updates = honest(seed, 6) * 100
    rule = CenteredClipping(radius=1.0, bucket=2)
    pairs = {
        tuple(np.flatnonzero(row[:-1]).tolist())
        for row in rule.buckets(tuple(range(6)), seed=seed, round=round)
    }
    means = [updates[list(pair)].astype(np.float64).mean(axis=0) for pair in pairs]

    change = aggregate(rule, updates, seed=seed, round=round).change

    assert len(pairs) == 3
    assert np.allclose(change, np.mean([m / np.linalg.norm(m) for m in means], axis=0))


@given(seeds, st.floats(0.5, 500))
def test_no_client_moves_a_clipped_mean_further_than_its_share_of_the_bound(seed: int, size: float):
    updates = honest(seed, 5)
    without = aggregate(NormClipping(bound=0.5), np.concatenate([updates, np.zeros((1, 6))]))
    liar = size * np.random.default_rng(seed).normal(size=(1, 6))

    with_it = aggregate(NormClipping(bound=0.5), np.concatenate([updates, liar]))

    assert np.linalg.norm(with_it.change - without.change) <= 0.5 / 6 + 1e-9


def test_weak_dp_adds_noise_of_its_size_that_the_round_decides():
    updates = np.zeros((3, 50_000))
    noise = [aggregate(WeakDP(sigma=0.1), updates, seed=1, round=r).change for r in (0, 0, 1)]

    assert np.array_equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0], noise[2])[0, 1]) < 0.03
    assert noise[0].mean() == pytest.approx(0, abs=0.003)
    assert noise[0].std() == pytest.approx(0.1, rel=0.03)
    assert np.mean(abs(noise[0]) < 0.1) == pytest.approx(0.6827, abs=0.01)


def test_rlr_turns_round_the_weights_on_which_too_few_agree():
    updates = np.array([[1.0, 1.0], [1.0, -4.0], [1.0, 1.0], [-1.0, -4.0]])

    change = aggregate(RobustLearningRate(threshold=0.5), updates).change

    assert change.tolist() == [0.5, 1.5]


@given(seeds, st.integers(5, 14))
def test_the_tight_majority_is_hdbscan_as_flame_sets_it(seed: int, clients: int):
    points = np.random.default_rng(seed).normal(size=(clients, 3))
    points[: clients // 2] *= 0.2
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    # scikit-learn counts a point among its own neighbours, the paper's implementation does not.
    search = HDBSCAN(
        min_cluster_size=clients // 2 + 1,
        min_samples=2,
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    )

    assert np.array_equal(tight_majority(apart), search.fit(apart).labels_ == 0)


@pytest.mark.parametrize("angles", ["models", "updates"])
def test_flame_turns_the_minority_away_and_clips_to_the_median_norm(angles: str):
    updates = honest(2, 9, spread=0.02)
    updates[:4] = -0.5 * updates[:4]
    updates[8] *= 2

    outcome = aggregate(
        Flame(noise=0, angles=angles), updates, references={"weights": np.full(6, 5.0)}
    )

    bound = np.median(np.linalg.norm(updates, axis=1))
    admitted = updates[4:] * np.minimum(
        1, bound / np.linalg.norm(updates[4:], axis=1, keepdims=True)
    )
    assert outcome.rejected == {0, 1, 2, 3}
    assert np.allclose(outcome.change, admitted.mean(axis=0), atol=1e-6)


def test_flame_adds_noise_in_units_of_the_median_norm():
    updates = np.tile(np.full(20_000, 0.01), (3, 1))

    outcome = aggregate(Flame(noise=0.5, angles="updates"), updates)

    assert (outcome.change - 0.01).std() == pytest.approx(0.5 * 0.01 * np.sqrt(20_000), rel=0.03)


def test_fltrust_follows_its_equation():
    root = np.array([2.0, 0.0])
    updates = np.array([[5.0, 0.0], [3.0, 4.0], [-9.0, 0.0]])

    outcome = aggregate(FLTrust(), updates, references={"root": root})

    expected = (1.0 * 2 * np.array([1, 0]) + 0.6 * 2 * np.array([0.6, 0.8])) / 1.6
    assert np.allclose(outcome.change, expected)
    assert outcome.rejected == {2}


def test_fltrust_stays_where_nobody_is_trusted():
    outcome = aggregate(FLTrust(), line(1, 2), references={"root": np.array([-1.0])})

    assert outcome.change.tolist() == [0.0]


def test_foolsgold_silences_sybils_by_what_they_sent_before():
    draw = np.random.default_rng(0)
    history = draw.normal(size=(6, 400))
    history[:2] = history[0]
    updates = 0.01 * draw.normal(size=(6, 400))

    outcome = aggregate(FoolsGold(), updates, history=history)

    assert outcome.rejected == {0, 1}
    assert all(outcome.factors[i] > 0.9 for i in range(2, 6))


def test_foolsgold_pardons_an_honest_client_that_resembles_sybils_a_little():
    sybil, other = np.eye(3)[0], np.eye(3)[1]
    alike = np.array([sybil, sybil, 0.6 * sybil + 0.8 * np.eye(3)[2], other])

    factors = aggregate(FoolsGold(), alike).factors

    # Its cosine with the sybils, .6, is pardoned to .36: .64 unlike, logit .58 + .5, so it counts.
    assert factors[2] == pytest.approx(1.0)
    assert factors[0] == 0


def test_only_rules_that_detect_say_whom_they_rejected():
    assert aggregate(FedAvg(), honest(0, 7)).rejected is None
    assert aggregate(Krum(), honest(0, 7)).rejected is not None


def test_another_round_draws_other_buckets():
    rule, clients = CenteredClipping(bucket=2), tuple(range(20))

    first, second = (rule.buckets(clients, seed=0, round=r) for r in (0, 1))

    assert not np.array_equal(first, second)
