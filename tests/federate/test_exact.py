"""The exact sum: neither the order nor the grouping of its terms is seen in it."""

from __future__ import annotations

import numpy as np
import pytest
from draws import seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.federate.aggregate.exact import LARGEST, ExactSum, check, fault, weighted_sum
from medspark.federate.weights import difference


def drawn(seed: int, clients: int = 12, length: int = 9):
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.integers(-8, 3, size=(clients, length))
    return (draw.normal(size=sizes.shape) * sizes).astype(np.float32), draw.integers(
        1, 99, clients
    ).astype(float)


@given(seeds, st.integers(1, 11))
def test_any_grouping_and_order_gives_the_same_bits(seed: int, cut: int):
    vectors, weights = drawn(seed)
    whole = ExactSum(9, weight=2000)
    parts = [ExactSum(9, weight=2000) for _ in range(2)]
    for i in range(12):
        whole.add(vectors[i], weights[i])
    for i in reversed(range(12)):
        parts[i < cut].add(vectors[i], weights[i])

    assert np.array_equal(whole.value(), parts[0].merge(parts[1]).value())


@given(seeds)
def test_the_error_is_what_the_module_says(seed: int):
    vectors, weights = drawn(seed)
    exact = vectors.astype(np.float64).T @ weights

    mean = weighted_sum(vectors, weights) / weights.sum()

    assert np.allclose(mean, exact / weights.sum(), rtol=1e-13, atol=12 * 2.0**-50)


@given(st.integers(1, 50))
def test_the_largest_numbers_of_all_clients_do_not_overflow(clients: int):
    weights = np.full(clients, 3.7)

    assert weighted_sum(np.full((clients, 1), LARGEST), weights)[0] == pytest.approx(
        LARGEST * weights.sum()
    )


def test_sums_of_different_units_do_not_merge():
    with pytest.raises(ValueError, match="units"):
        ExactSum(1, weight=1).merge(ExactSum(1, weight=64))


@given(seeds, st.floats(0.1, 99))
def test_changes_of_weights_are_added_and_checked_as_their_differences_are(
    seed: int, weight: float
):
    (*trained, weights), _ = drawn(seed, clients=4, length=70_000)
    factors = [weight, -2.5, 40.0]
    stored, passing = ExactSum(70_000, weight=200), ExactSum(70_000, weight=200)
    for vector, factor in zip(trained, factors, strict=True):
        stored.add(difference(vector, weights), factor)

    checks = passing.add_changes(trained, weights, factors)

    assert checks == [check(vector, weights) for vector in trained]
    assert np.array_equal(stored.units, passing.units)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, LARGEST])
def test_units_are_rounded_to_the_nearest_even_whatever_their_size(size: float):
    total = ExactSum(5, weight=1)
    unit = 2.0**-total._exponent
    change = np.array([0.5, 1.5, -2.5, 0.49, 0.0]) * unit
    change[-1] = size

    total.add_changes([change], np.zeros(5), [1.0])

    assert total.units.tolist() == [0, 2, -2, 0, round(size / unit)]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 2 * LARGEST])
def test_of_a_change_that_no_rule_can_use_nothing_is_added(number: float):
    (first, trained, last, weights), _ = drawn(3, clients=4, length=70_000)
    total, others = ExactSum(70_000, weight=100), ExactSum(70_000, weight=100)
    others.add_changes([first, last], weights, [7.0, 2.0])
    trained[69_000] = number

    _, (reason, _), _ = total.add_changes([first, trained, last], weights, [7.0, 3.0, 2.0])

    assert reason == check(trained, weights)[0] == fault(difference(trained, weights)) is not None
    assert np.array_equal(total.units, others.units)


def test_many_small_changes_are_no_large_one():
    weights = np.zeros(70_000)

    assert check(weights + 0.9 * LARGEST, weights)[0] is None
