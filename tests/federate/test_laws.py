"""The laws of aggregation (law 10 of the design), for every rule that there is."""

from __future__ import annotations

import numpy as np
import pytest
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError, UsageError
from medspark.federate.aggregate import RULES, Rule, aggregate, in_memory, measure
from medspark.federate.aggregate.exact import ExactSum
from medspark.federate.aggregate.rule import Measured

CLIENTS = 11
# With settings under which the rule has no noise and does not clip honest updates.
QUIET: dict[str, Rule] = {
    name: kind(**settings)
    for name, kind in RULES.items()
    for settings in [
        {
            "norm_clipping": {"bound": 1e3},
            "weak_dp": {"bound": 1e3, "sigma": 0},
            "dp_fedavg": {"bound": 1e3, "multiplier": 0, "expected": CLIENTS},
            "centered_clipping": {"radius": 1e3},
            "flame": {"noise": 0},
            "krum": {"adversaries": 2},
            "multi_krum": {"adversaries": 2},
            "bulyan": {"adversaries": 2},
        }.get(name, {})
    ]
}
# FedAdam and FedYogi send on the direction, not the size; FoolsGold takes agreement for sybils.
NO_MEAN = ("fedadam", "fedyogi", "foolsgold")
# The published share of all clients below which liars move the outcome by no more than a bound.
WITHSTANDS = {
    "median": ({}, 5),
    "trimmed_mean": ({"trim": 0.4}, 4),
    "krum": ({"adversaries": 4}, 4),
    "multi_krum": ({"adversaries": 4}, 4),
    "bulyan": ({"adversaries": 2}, 2),
    "rfa": ({}, 5),
    "flame": ({"noise": 0}, 5),
    "fltrust": ({}, 10),
}
every_rule = pytest.mark.parametrize("name", RULES)


def given_root(updates: np.ndarray) -> dict[str, np.ndarray]:
    return {"root": updates[0], "weights": np.ones(updates.shape[1])}


@every_rule
@given(seed=seeds)
def test_the_order_of_the_clients_changes_no_bit(name: str, seed: int):
    updates, order = honest(seed, CLIENTS), np.random.default_rng(seed).permutation(CLIENTS)
    counts, ids = np.arange(1.0, CLIENTS + 1), np.arange(CLIENTS)

    one = aggregate(QUIET[name], updates, counts=counts, references=given_root(updates))
    other = aggregate(
        QUIET[name],
        updates[order],
        counts=counts[order],
        clients=ids[order].tolist(),
        references=given_root(updates),
    )

    assert np.array_equal(one.change, other.change)
    assert (one.factors, one.rejected) == (other.factors, other.rejected)


# Buckets are drawn by the clients' numbers, and Bulyan's last picks are often between two clients
# that are each other's nearest: their scores are equal, and the lower number is picked.
@pytest.mark.parametrize("name", sorted({*RULES} - {"centered_clipping", "bulyan"}))
@given(seed=seeds)
def test_which_client_has_which_number_changes_nothing(name: str, seed: int):
    updates, order = honest(seed, CLIENTS), np.random.default_rng(seed).permutation(CLIENTS)

    one = aggregate(QUIET[name], updates, references=given_root(updates))
    other = aggregate(QUIET[name], updates[order], references=given_root(updates))

    assert np.allclose(one.change, other.change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*RULES} - {*NO_MEAN}))
@given(seed=seeds)
def test_clients_that_agree_are_followed(name: str, seed: int):
    updates = np.tile(honest(seed, 1), (CLIENTS, 1))

    change = aggregate(QUIET[name], updates, references=given_root(updates)).change

    assert np.allclose(change, updates[0], rtol=1e-9, atol=CLIENTS * 2.0**-50)


@pytest.mark.parametrize("name", WITHSTANDS)
@given(seed=seeds, size=st.floats(1, 500), aligned=st.booleans())
def test_as_many_liars_as_published_do_not_move_the_outcome_out_of_the_honest_hull(
    name: str, seed: int, size: float, aligned: bool
):
    settings, liars = WITHSTANDS[name]
    updates = honest(seed, CLIENTS)
    root = updates[-1].copy()
    draw = np.random.default_rng(seed)
    lies = draw.normal(size=updates.shape[1]) if aligned else draw.normal(size=(liars, 6))
    updates[:liars] = size * lies
    good = updates[liars:].astype(np.float64)
    centre = good.mean(axis=0)
    widest = np.linalg.norm(good - centre, axis=1).max()

    change = aggregate(
        RULES[name](**settings), updates, references={"root": root, "weights": np.ones(6)}
    ).change

    # FLTrust: within the length of the root update. The others: near the honest ones.
    bound = 2 * np.linalg.norm(root) if name == "fltrust" else 12 * widest
    assert np.linalg.norm(change - (0 if name == "fltrust" else centre)) <= bound


@given(seeds)
def test_one_liar_moves_the_mean_as_far_as_it_likes(seed: int):
    updates = honest(seed, CLIENTS)
    updates[0] = 3000

    assert (aggregate(RULES["fedavg"](), updates).change > 200).all()


@every_rule
@given(seed=seeds, poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_numbers_that_are_none_never_poison_and_are_named(name: str, seed: int, poison: float):
    updates = honest(seed, CLIENTS + 1)
    updates[4, 2] = poison
    others = [i for i in range(CLIENTS + 1) if i != 4]

    outcome = aggregate(QUIET[name], updates, references=given_root(updates))
    without = aggregate(
        QUIET[name], updates[others], clients=others, references=given_root(updates)
    )

    assert np.array_equal(outcome.change, without.change)
    assert list(outcome.left_out) == [4]


@every_rule
def test_chunks_of_any_length_give_the_same_outcome(name: str, monkeypatch: pytest.MonkeyPatch):
    updates = honest(3, CLIENTS, 50)
    whole = aggregate(RULES[name](), updates, references=given_root(updates))
    monkeypatch.setattr(measure, "CHUNK", 7)

    pieces = aggregate(RULES[name](), updates, references=given_root(updates))

    assert np.allclose(whole.change, pieces.change, rtol=1e-9, atol=1e-12)
    assert whole.rejected == pieces.rejected


@pytest.mark.parametrize("name", [name for name, kind in RULES.items() if kind.separable])
@given(seed=seeds, cut=st.integers(1, CLIENTS - 1))
def test_a_separable_rule_can_be_added_up_where_the_updates_are_made(
    name: str, seed: int, cut: int
):
    rule = RULES[name]()
    updates, counts = honest(seed, CLIENTS), np.arange(1.0, CLIENTS + 1)
    squares = np.square(updates.astype(np.float64)).sum(axis=1)

    def seen(who: slice) -> Measured:
        return Measured(tuple(range(CLIENTS)[who]), counts[who], squares[who], np.empty((0, 0)))

    tasks = [ExactSum(6, weight=counts.sum()) for _ in range(2)]
    for client in np.random.default_rng(seed).permutation(CLIENTS):
        factor = rule.weigh(seen(slice(client, client + 1))).factors[0]
        tasks[int(client < cut)].add(updates[client], factor)
    weighing = rule.weigh(seen(slice(None)))
    mean = tasks[0].merge(tasks[1]).value() / weighing.divisor

    whole = rule.combine(updates.astype(np.float64), weighing, np.empty((0, 6)))
    assert np.allclose(mean, whole, rtol=1e-12, atol=1e-12)


@given(seeds)
def test_fedavg_is_the_mean_and_counts_images(seed: int):
    updates, counts = honest(seed, 4).astype(np.float64), [1.0, 2.0, 3.0, 4.0]

    plain = aggregate(RULES["fedavg"](), updates).change
    weighted = aggregate(RULES["fedavg"](), updates, counts=counts).change

    assert np.allclose(plain, updates.mean(axis=0), atol=2.0**-45)
    assert np.allclose(weighted, counts @ updates / 10, atol=2.0**-45)


@every_rule
def test_a_rule_says_how_many_clients_it_takes(name: str):
    rule = QUIET[name]
    if rule.least > 1:
        with pytest.raises(UsageError, match=f"at least {rule.least} clients"):
            aggregate(rule, honest(0, rule.least - 1))


def test_a_round_without_any_update_fails_with_one_sentence():
    with pytest.raises(RunError, match="No client"):
        aggregate(RULES["fedavg"](), np.full((2, 3), np.nan))


def test_an_update_is_refused_for_one_bad_number():
    assert in_memory.fault(np.array([0.0, 1.0])) is None
    assert "finite" in str(in_memory.fault(np.array([0.0, np.nan])))
    assert "more than" in str(in_memory.fault(np.array([0.0, -1e5])))
