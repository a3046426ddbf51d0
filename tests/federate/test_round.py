"""A round: who is asked, who is counted, and that nothing else is seen in what comes of it."""

from __future__ import annotations

import numpy as np
import pytest
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.federate.aggregate import RULES, aggregate
from medspark.federate.client import Answer, Memory
from medspark.federate.round import cohort, finish_round, next_control

START = np.linspace(-1, 1, 6).astype(np.float32)
FEDAVG = RULES["fedavg"]()


def answer(weights: np.ndarray, images: int = 1, control: np.ndarray | None = None) -> Answer:
    return Answer(weights.astype(np.float32), images, 1, 0.0, Memory(), control)


def answers(seed: int, clients: int = 5) -> dict[int, Answer]:
    return {
        client: answer(START + update, images=client + 1)
        for client, update in enumerate(honest(seed, clients))
    }


@given(seeds, st.integers(1, 30), st.integers(1, 40))
def test_a_cohort_is_as_large_as_asked_and_nobody_is_in_it_twice(seed: int, per: int, total: int):
    found = cohort(range(total), per, seed=seed, round=3)

    assert len(found) == len(set(found)) == min(per, total)
    assert set(found) <= set(range(total))


@given(seeds)
def test_who_else_there_is_changes_nobodys_place(seed: int):
    everybody = cohort(range(40), 10, seed=seed, round=0)

    few = cohort(range(0, 40, 2), len([c for c in everybody if c % 2 == 0]), seed=seed, round=0)

    assert few == [c for c in everybody if c % 2 == 0]


def test_over_many_rounds_every_client_is_asked_as_often():
    asked = np.bincount(
        np.concatenate([cohort(range(20), 5, seed=1, round=r) for r in range(2000)])
    )

    assert asked == pytest.approx(500, abs=80)


@given(seeds)
def test_the_order_of_the_answers_changes_no_bit(seed: int):
    given_, order = answers(seed), np.random.default_rng(seed).permutation(5).tolist()

    one = finish_round(START, given_, FEDAVG, least=1)
    other = finish_round(START, {c: given_[c] for c in order}, FEDAVG, least=1)

    assert np.array_equal(one.weights, other.weights)
    assert one.counted == other.counted == (0, 1, 2, 3, 4)


@given(seeds)
def test_who_is_left_out_is_named_and_is_not_seen_in_the_result(seed: int):
    broken = answers(seed) | {
        7: answer(np.full(6, np.nan)),
        8: answer(np.zeros(5)),
        9: answer(np.full(6, 1e9)),
    }

    found = finish_round(START, broken, FEDAVG, least=5, failed={6: "the executor was lost"})

    assert np.array_equal(
        found.weights, finish_round(START, answers(seed), FEDAVG, least=5).weights
    )
    assert found.counted == (0, 1, 2, 3, 4)
    assert {c: reason.split()[1] for c, reason in found.left_out.items()} == {
        6: "executor",
        7: "update",
        8: "answer",
        9: "update",
    }


def test_a_round_with_too_few_clients_fails_and_says_who_was_left_out():
    few = {0: answer(START), 3: answer(np.full(6, np.inf))}

    with pytest.raises(RunError, match=r"needs 2 usable answers and has 1\..*Client 3 .*finite"):
        finish_round(START, few, FEDAVG, least=2, round=4)


@given(seeds)
def test_one_client_that_answers_is_followed_to_the_last_bit(seed: int):
    only = {4: answer(START + honest(seed, 1)[0], images=37)}

    assert np.array_equal(finish_round(START, only, FEDAVG, least=1).weights, only[4].weights)


def test_other_counts_take_the_place_of_images():
    two = {0: answer(START + 1), 1: answer(START + 4)}

    found = finish_round(START, two, FEDAVG, least=2, counts={0: 2.0, 1: 1.0})

    assert np.allclose(found.change, 2.0)


@given(seeds)
def test_a_rule_that_remembers_judges_by_all_that_a_client_has_sent(seed: int):
    rule, rounds = RULES["foolsgold"](), [honest(seed + i, 4) for i in range(2)]
    asked = [(0, 1, 2, 3), (2, 3, 5, 1)]
    kept: dict[int, np.ndarray] = {}

    for updates, clients in zip(rounds, asked, strict=True):
        sent = {c: answer(START + u) for c, u in zip(clients, updates, strict=True)}
        found = finish_round(START, sent, rule, least=4, history=kept)
        kept |= found.history

    assert set(kept) == {0, 1, 2, 3, 5}
    sums = [rounds[1][i] + (rounds[0][c] if c != 5 else 0) for i, c in enumerate(asked[1])]
    alone = aggregate(rule, np.stack(sums), clients=asked[1]).factors
    assert found.factors == pytest.approx(alone, abs=1e-3)
    assert np.allclose(kept[3], rounds[0][3] + rounds[1][1], atol=1e-5)


def test_other_rules_remember_nobody():
    assert finish_round(START, answers(0), FEDAVG, least=1).history == {}


def test_what_a_server_optimiser_remembers_goes_on():
    rule = RULES["fedavgm"](momentum=0.5)
    two = {0: answer(START + 1), 1: answer(START + 1)}

    first = finish_round(START, two, rule, least=2)
    second = finish_round(START, two, rule, least=2, state=first.state)

    assert np.allclose(second.change, 1.5)


def test_scaffolds_control_moves_by_the_share_of_all_clients():
    moved = [answer(START, control=np.full(6, 3.0)), answer(START, control=np.full(6, 5.0))]

    assert np.allclose(next_control(np.ones(6), moved, clients=4), 1 + 8 / 4)
    assert np.allclose(next_control(np.ones(6), [answer(START)], clients=4), 1)
