"""User-level differential privacy: published epsilons, sampling, sensitivity and noise."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.federate.aggregate import aggregate
from medspark.federate.privacy import PrivacyConfig, epsilon


@pytest.mark.parametrize(
    ("clients", "cohort", "rounds", "published"),
    [
        (10**5, 100, 10**4, 0.884),
        (10**5, 100, 10**5, 1.899),
        (10**5, 100, 10**6, 6.830),
        (10**6, 1000, 10**4, 1.095),
        (10**6, 1000, 10**5, 2.130),
        (10**6, 1000, 10**6, 7.505),
    ],
)
def test_epsilon_is_the_published_one(clients: int, cohort: int, rounds: int, published: float):
    """FL4Health's table of user-level privacy: noise multiplier 1, delta = clients ** -1.1."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")

    found = PrivacyConfig(multiplier=1.0, rate=cohort / clients).epsilon(clients, rounds)

    assert found == pytest.approx(published, abs=2e-3)


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    costs = [epsilon(0.01, z, rounds, 1e-5) for z, rounds in ((2, 10), (1, 10), (1, 100))]

    assert costs == sorted(costs)


def test_nothing_is_spent_before_the_first_round():
    assert PrivacyConfig().epsilon(100, 0) == 0


def test_a_missing_accountant_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)

    with pytest.raises(UsageError, match=r"medspark\[privacy\]"):
        PrivacyConfig().epsilon(100, 1)


@given(seeds, st.floats(0.05, 0.95))
def test_each_client_is_drawn_by_a_coin_of_its_own(seed: int, rate: float):
    config, clients = PrivacyConfig(rate=rate), list(range(40))

    drawn = [config.cohort(clients, seed=seed, round=r) for r in range(100)]
    fewer = [config.cohort(clients[:20], seed=seed, round=r) for r in range(100)]

    assert np.mean([len(c) for c in drawn]) == pytest.approx(40 * rate, abs=2.5)
    assert fewer == [[c for c in cohort if c < 20] for cohort in drawn]


@given(seeds, st.floats(0.1, 1000))
def test_no_client_moves_the_mean_further_than_the_noise_is_meant_for(seed: int, size: float):
    rule = PrivacyConfig(bound=0.5, rate=0.1).rule(60).model_copy(update={"multiplier": 0.0})
    updates = honest(seed, 5)
    other = size * np.random.default_rng(seed).normal(size=(1, 6))

    with_it = aggregate(rule, np.concatenate([updates, other])).change
    without = aggregate(rule, updates).change

    assert np.linalg.norm(with_it - without) <= 0.5 / 6 + 1e-9


@pytest.mark.parametrize("clients", [0, 3])
def test_the_noise_does_not_tell_how_many_took_part(clients: int):
    rule = PrivacyConfig(multiplier=2.0, bound=0.5, rate=0.1).rule(40)

    change = aggregate(rule, np.zeros((clients, 20_000)), seed=4).change

    assert change.std() == pytest.approx(2.0 * 0.5 / 4, rel=0.03)


def test_the_private_mean_is_over_the_clients_expected_not_over_those_who_came():
    rule = PrivacyConfig(bound=0.5, rate=0.1).rule(40).model_copy(update={"multiplier": 0.0})

    change = aggregate(rule, np.array([[3.0, 4.0]])).change

    assert np.allclose(change, np.array([0.3, 0.4]) / 4)
