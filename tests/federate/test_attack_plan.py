"""An attack's plan: who lies in which round, what a liar knows, and what it sends untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import pytest
import small
import torch
from draws import honest, seeds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from medspark.config import Config, load_config
from medspark.errors import UsageError
from medspark.federate.adversary import ADVERSARIES, Known
from medspark.federate.adversary.a3fl import A3FL
from medspark.federate.adversary.config import AdversaryConfig, check_adversary
from medspark.federate.adversary.edge_holder import EdgeHolder
from medspark.federate.adversary.plan import (
    forged,
    holders,
    malicious,
    plan_liars,
    selected,
    waits,
)
from medspark.federate.client import Answer, Liar, Memory
from medspark.federate.edge import EdgeImages
from medspark.federate.round import cohort
from medspark.federate.weights import pack
from medspark.shards.manifest import read_manifest

CLIENTS = range(40)
EDGE = EdgeImages(torch.ones(6, 1, 8, 8), torch.tensor([1, 1, 2, 2, 1, 2]))


def attack(name: Any = "badnets", **settings: Any) -> AdversaryConfig:
    return AdversaryConfig(name=name, **{"share": 0.25} | settings)


def liars(config: AdversaryConfig, clients: Any, **settings: Any) -> dict[int, Liar]:
    images = {client: client + 1 for client in clients}
    return plan_liars(
        config, CLIENTS, images, **{"seed": 1, "round": 0, "classes": 3, "edge": EDGE} | settings
    )


def test_every_adversary_has_a_section_of_its_own():
    sections = {name: type(getattr(AdversaryConfig(), name)) for name in ADVERSARIES}

    assert sections == ADVERSARIES
    assert {attack(name, edge="phantom").adversary.__class__ for name in ADVERSARIES} == set(
        ADVERSARIES.values()
    )


class Job(Config):
    adversary: AdversaryConfig = AdversaryConfig()


def test_an_adversary_is_set_by_dotted_keys():
    words = "--adversary.name projected --adversary.edge phantom --adversary.clients 3,7"

    found = load_config(Job, [*words.split(), "--adversary.projected.radius", "1.5"]).adversary

    assert found.clients == (3, 7)
    assert found.adversary == ADVERSARIES["projected"](radius=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "edge_case"}, "edge_case needs tail images"),
        ({"honest_edge": 0.1}, "honest_edge needs tail images"),
        ({"from_round": 4, "until_round": 4}, "until_round"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str):
    with pytest.raises(ValidationError, match=message):
        AdversaryConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": (3, 40)}, "no client 40, they are 0 to 39"),
        ({"name": "badnets", "badnets": {"target": 2}}, "badnets.target: there is no class 2"),
        ({"edge": "phantom", "edge_label": 2}, "edge_label: there is no class 2"),
        ({"per_round": 9}, "more than the 8 clients of a round"),
    ],
)
def test_an_attack_that_does_not_fit_the_federation_is_refused(
    settings: Any, message: str, tmp_path: Path
):
    config, manifest = AdversaryConfig(**settings), read_manifest(small.write(tmp_path / "shards"))

    with pytest.raises(UsageError, match=message):
        check_adversary(config, manifest, clients=40, per_round=8)


def test_findings_are_not_attacked(tmp_path: Path):
    arrays = {"train": (np.zeros((4, 8, 8, 1), np.uint8), np.eye(4, 3, dtype=np.int64))}
    manifest = read_manifest(array_shards.write_arrays(tmp_path / "shards", arrays))

    with pytest.raises(UsageError, match="one class each"):
        check_adversary(attack(), manifest, clients=40, per_round=8)


@given(seeds, st.integers(1, 60), st.floats(0, 1))
def test_the_share_of_all_clients_is_malicious(seed: int, count: int, share: float):
    found = malicious(attack(share=share), range(count), seed=seed)

    assert len(set(found)) == len(found) == round(share * count)
    assert set(found) <= set(range(count))


def test_named_clients_are_malicious_and_nobody_is_without_an_adversary():
    assert malicious(attack(clients=(7, 3)), CLIENTS, seed=0) == [3, 7]
    assert malicious(attack("none", clients=(7, 3)), CLIENTS, seed=0) == []


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 4))
def test_an_attack_has_its_rounds(first: int, length: int, every: int):
    config = attack(from_round=first, until_round=first + length, round_every=every)

    found = [round for round in range(30) if config.attacks_in(round)]

    assert found == list(range(first, first + length, every))


@given(seeds, st.integers(1, 8), st.integers(0, 5))
def test_a_fixed_number_of_malicious_clients_is_in_every_attacked_round(
    seed: int, number: int, round: int
):
    config = attack(per_round=number, round_every=2)

    found = selected(config, CLIENTS, 8, seed=seed, round=round)

    lying = set(found) & set(malicious(config, CLIENTS, seed=seed))
    assert len(set(found)) == 8
    if round % 2:
        assert found == cohort(CLIENTS, 8, seed=seed, round=round)
    else:
        assert len(lying) == number


def test_honest_clients_fill_a_round_that_malicious_ones_do_not():
    found = selected(attack(clients=(5,), per_round=3), CLIENTS, 8, seed=0, round=0)

    assert 5 in found
    assert len(found) == 8


@given(seeds, st.permutations(range(12)))
def test_what_a_liar_knows_is_of_its_round_and_of_no_order(seed: int, order: list[int]):
    config = attack(clients=(2, 5, 11, 30))

    found = liars(config, order, seed=seed, round=4)

    by_number = liars(config, sorted(order), seed=seed, round=4)
    assert {c: facts(liar) for c, liar in found.items()} == {
        c: facts(liar) for c, liar in by_number.items()
    }
    assert sorted(found) == [2, 5, 11]
    assert [found[c].known.number for c in (2, 5, 11)] == [0, 1, 2]
    assert [found[c].known.share for c in (2, 5, 11)] == [3 / 78, 6 / 78, 12 / 78]
    assert {(k.liars, k.clients, k.round, k.classes) for k in map(known, found.values())} == {
        (3, 12, 4, 3)
    }


def known(liar: Liar) -> Known:
    return liar.known


def facts(liar: Liar) -> dict[str, object]:
    """Return what the liar knows, in a form that can be compared."""
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(liar.known).items()
    }


@given(seeds)
def test_every_liar_and_round_has_a_key_of_its_own(seed: int):
    config = attack(clients=(2, 5))

    found = [liars(config, CLIENTS, seed=seed, round=round) for round in range(3)]

    assert len({liar.known.key for part in found for liar in part.values()}) == 6


def test_nobody_lies_in_rounds_without_an_attack():
    assert liars(attack(from_round=3), CLIENTS, round=2) == {}


@pytest.mark.parametrize(("name", "told"), [("neurotoxin", True), ("badnets", False)])
def test_the_last_change_is_known_to_whom_it_concerns(name: str, told: bool):
    found = liars(attack(name), CLIENTS, last_change=np.ones(4))

    assert {liar.known.last_change is not None for liar in found.values()} == {told}


@given(seeds)
def test_honest_clients_that_hold_edge_images_keep_them(seed: int):
    config = attack("edge_case", edge="phantom", honest_edge=0.2, until_round=1)

    first, later = (liars(config, CLIENTS, seed=seed, round=round) for round in (0, 1))

    holding = holders(config, CLIENTS, seed=seed)
    assert len(holding) == 6
    assert not set(holding) & set(malicious(config, CLIENTS, seed=seed))
    assert {c: first[c].known.key for c in holding} == {c: later[c].known.key for c in holding}
    assert sorted(later) == holding


def test_an_edge_holder_learns_their_true_classes():
    images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    told = Known(edge=EDGE.images, edge_labels=EDGE.labels, key=3)

    found, classes = EdgeHolder(edge_images=4).poison(images, labels, told)

    assert len(found) == len(classes) == 8
    assert (found[4:] == 1).all()
    assert set(classes[4:].tolist()) <= {1, 2}
    assert classes[:4].tolist() == [0] * 4


def answers(seed: int, clients: int = 5) -> dict[int, Answer]:
    updates = honest(seed, clients).astype(np.float32)
    return {client: Answer(u, 10, 1, 0.0, Memory()) for client, u in enumerate(updates)}


@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_who_waits_sends_what_follows_from_the_honest_updates(name: str):
    start, others = np.zeros(6, dtype=np.float32), answers(3)
    lying = liars(attack(name, clients=(7, 9)), range(10))
    updates = np.stack([others[c].weights for c in range(5)]).astype(np.float64)

    found = forged(lying, start, others, {7: 30, 9: 40})

    assert all(waits(liar) for liar in lying.values())
    assert {c: a.images for c, a in found.items()} == {7: 30, 9: 40}
    told = Known(honest=updates, liars=2, clients=10)
    wanted = lying[7].adversary.send(np.zeros(6), told)
    assert np.allclose(found[7].weights, wanted, atol=1e-6)
    assert np.array_equal(found[7].weights, found[9].weights)


def test_nothing_is_forged_from_updates_that_are_of_no_use():
    start = np.zeros(6, dtype=np.float32)
    broken = {0: Answer(np.full(6, np.nan, np.float32), 1, 1, 0.0, Memory()),
              1: Answer(np.zeros(5, np.float32), 1, 1, 0.0, Memory())}  # fmt: skip

    assert forged(liars(attack("ipm", clients=(7,)), range(10)), start, broken, {7: 3}) == {}


def test_a_trained_liar_does_not_wait():
    assert not any(map(waits, liars(attack("badnets"), CLIENTS).values()))
    assert not waits(None)


def test_a_backdoor_may_train_longer_than_honest_clients(tmp_path: Path):
    folder, weights = small.write(tmp_path / "shards"), pack(small.network(), "frozen")
    honestly = small.train(folder, weights, small.local(), liar=Liar(ADVERSARIES["badnets"]()))

    longer = Liar(ADVERSARIES["badnets"](epochs=3))

    assert small.train(folder, weights, small.local(), liar=longer).steps == 3 * honestly.steps
    assert ADVERSARIES["label_flip"]().passes(2) == 2


def test_the_trigger_that_a_liar_prepares_comes_with_its_answer(tmp_path: Path):
    folder, weights = small.write(tmp_path / "shards"), pack(small.network(), "frozen")
    liar = Liar(A3FL(size=3, steps=2, unlearn_steps=1))

    found = small.train(folder, weights, small.local(), liar=liar)

    assert found.pattern is not None
    assert found.pattern.shape == (1, 3, 3)
