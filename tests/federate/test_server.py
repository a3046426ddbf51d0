"""Rounds of a federation: the same bits however they are divided, and what each rule needs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretended_rounds import (
    CLIENTS,
    SEED,
    Rounds,
    first_of,
    in_memory,
    pretend,
    shards,
    tiny_networks_in_several_chunks,
    write,
)

from medspark.errors import UsageError
from medspark.federate import server
from medspark.federate.adversary.plan import forged, plan_liars
from medspark.federate.aggregate import RULES
from medspark.federate.client import Answer, Memory
from medspark.federate.server import groups, slices
from medspark.federate.sfat import slack_counts
from medspark.federate.weights import apply

__all__ = ["shards", "tiny_networks_in_several_chunks"]

# Six of eight clients in each round, so that clients come and go.
SIX = {"by": "dirichlet", "count": CLIENTS, "per_round": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"aggregate": name, "clients": SIX if name != "bulyan" else SIX | {"per_round": 7}}
    for name in RULES
}
SETTINGS["centered_clipping"]["rule"] = {"radius": 0.1}
SETTINGS["clipped"] = {"aggregate": "norm_clipping", "rule": {"bound": 0.1}, "clients": SIX}
SETTINGS["private"] = {"privacy": {"rate": 0.7, "bound": 0.1}}
SETTINGS["scaffold"] = {"scaffold": True, "clients": SIX}
SETTINGS["slack"] = {"sfat": {"slack": 0.2, "enhanced": 2}}
SETTINGS["alie"] = {"adversary": {"name": "alie", "clients": (1, 4)}}
SETTINGS["neurotoxin"] = {"adversary": {"name": "neurotoxin", "clients": (1,)}}


# --- the same bits ---


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_any_number_of_tasks_gives_the_same_bits(shards: Path, tmp_path: Path, settings: Any):
    one, three = (
        Rounds(shards, tmp_path / str(parts), parts=parts, **settings) for parts in (1, 3)
    )

    for first, second in zip(one.run(3), three.run(3), strict=True):
        assert without_seconds(first) == without_seconds(second)
    assert one.weights.tobytes() == three.weights.tobytes()


def without_seconds(record: Any) -> Any:
    return record.model_dump(exclude={"seconds", "aggregation_seconds"})


@pytest.mark.parametrize("name", sorted(set(RULES) - {"dp_fedavg"}))
def test_a_rule_does_on_files_what_it_does_in_memory(shards: Path, tmp_path: Path, name: str):
    found = Rounds(shards, tmp_path, parts=2, **SETTINGS[name])
    weights, outcomes = in_memory(found, 3)

    records = found.run(3)

    assert np.abs(found.weights - weights).max() < 1e-6
    for record, outcome in zip(records, outcomes, strict=True):
        rejected = outcome.rejected
        assert record.rejected == (None if rejected is None else tuple(sorted(rejected)))
        assert set(record.clients) == set(outcome.factors)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.integers(1, 8))
def test_groups_hold_every_client_once_and_about_as_many_images(counts: list[int], parts: int):
    asked = range(len(counts))

    found = groups(asked, counts, parts)

    assert sorted(client for group in found for client in group) == list(asked)
    assert len(found) == min(parts, len(counts))
    assert all(group for group in found) or 0 in counts
    loads = [sum(counts[client] for client in group) for group in found]
    assert max(loads) - min(loads) <= max(counts)


@given(st.integers(1, 5000), st.integers(1, 9))
def test_slices_are_whole_chunks_that_cover_every_coordinate_once(length: int, parts: int):
    found = slices(length, parts)

    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == length
    assert all(start % server.CHUNK == 0 and start < stop for start, stop in found)
    assert len(found) <= parts


# --- what a round needs of the rounds before ---


def test_scaffolds_control_is_the_sum_of_all_moves_over_all_clients(shards: Path, tmp_path: Path):
    moves: list[Any] = []
    seen: dict[int, Any] = {}

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config, **given)
        moves.append(answer.control_change)
        seen[task.round] = task.control
        return answer

    found = Rounds(shards, tmp_path, train=train, parts=2, scaffold=True, clients=SIX)
    found.run(3)

    assert seen[0] is None
    assert np.allclose(seen[2], sum(moves[:12]) / CLIENTS, atol=1e-9)
    assert np.allclose(found.folder.read(2, "control"), sum(moves) / CLIENTS, atol=1e-9)


def test_a_client_gets_its_own_memory_of_the_last_round_that_counted_it(
    shards: Path, tmp_path: Path
):
    kept: dict[int, Any] = {}
    times: dict[int, int] = {}
    wrong: list[int] = []

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        me, memory = first_of(rows), given["memory"]
        wrong.extend([] if np.array_equal(getattr(memory, "norms", None), kept.get(me)) else [me])
        times[me] = times.get(me, 0) + 1
        if times[me] == 2:
            raise ValueError("not today")
        kept[me] = np.full(3, 100 * task.round + me, dtype=np.float32)
        return Answer(task.weights, len(rows), 1, 0.0, Memory(norms=kept[me]))

    Rounds(shards, tmp_path, train=train, batch_norm="local", clients=SIX).run(3)
    Rounds(shards, tmp_path, train=train, batch_norm="local", clients=SIX).run(3)

    assert wrong == []
    assert len(kept) == CLIENTS
    assert min(times.values()) >= 3


def test_twins_of_an_earlier_round_are_still_rejected_by_foolsgold(shards: Path, tmp_path: Path):
    twins = {first_of(Rounds(shards, tmp_path / "look").rows(c)) for c in (1, 6)}

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config, **given)
        if task.round == 0 and first_of(rows) in twins:
            return Answer(task.weights + 1, len(rows), 1, 0.0, Memory())
        return answer

    found = Rounds(shards, tmp_path / "f", train=train, aggregate="foolsgold", parts=2)

    assert [record.rejected for record in found.run(2)] == [(1, 6), (1, 6)]


def test_slack_lets_the_smallest_losses_count_more(shards: Path, tmp_path: Path):
    found = Rounds(shards, tmp_path, sfat={"slack": 0.25, "enhanced": 2})
    base = found.weights
    found.run()

    counts = np.array(found.clients.counts, float)
    losses = [1 / (1 + first_of(found.rows(c))) for c in range(CLIENTS)]
    weighed = slack_counts(counts.tolist(), losses, slack=0.25, enhanced=2)
    updates = np.stack([found.update(base, c, 0) for c in range(CLIENTS)])
    assert np.allclose(found.weights, apply(base, weighed @ updates / weighed.sum()), atol=1e-6)


# --- adversaries ---


@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_liars_that_wait_send_what_they_forge_from_the_honest(
    shards: Path, tmp_path: Path, name: str
):
    found = Rounds(shards, tmp_path, parts=2, adversary={"name": name, "clients": (1, 4)})
    base, images = found.weights, dict(enumerate(map(int, found.clients.counts)))
    liars = plan_liars(
        found.config.adversary, range(CLIENTS), images, seed=SEED, round=0, classes=2
    )
    honest = {c: found.update(base, c, 0) for c in range(CLIENTS) if c not in liars}
    answers = {c: Answer(apply(base, u), 1, 1, 0.0, Memory()) for c, u in honest.items()}
    lies = {c: a.weights - base for c, a in forged(liars, base, answers, images).items()}

    (record,) = found.run()

    sent = honest | lies
    mean = sum(images[c] * np.asarray(sent[c], float) for c in sent) / sum(images.values())
    assert sorted(lies) == [1, 4]
    assert record.clients == tuple(range(CLIENTS))
    assert np.allclose(found.weights, apply(base, mean), atol=1e-6)


def test_an_adversary_knows_the_last_change_and_the_newest_trigger(shards: Path, tmp_path: Path):
    known: list[Any] = []

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config)
        if given["liar"] is None:
            return answer
        known.append(given["liar"].known)
        pattern = torch.full((1, 2, 2), float(task.round))
        return Answer(**vars(answer) | {"pattern": pattern})

    adversary = {"name": "neurotoxin", "clients": (2,), "round_every": 2}
    found = Rounds(shards, tmp_path, train=train, adversary=adversary)
    before, steps = found.weights, []
    for _ in range(3):
        found.run()
        steps.append(found.weights - before)
        before = found.weights

    assert [k.round for k in known] == [0, 2]
    assert known[0].last_change is known[0].pattern is None
    assert np.allclose(known[1].last_change, steps[1], atol=1e-6)
    assert torch.equal(known[1].pattern, torch.zeros(1, 2, 2))


def test_only_the_newest_trigger_stays(shards: Path, tmp_path: Path):
    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config)
        pattern = None if given["liar"] is None else torch.zeros(1, 2, 2)
        return Answer(**vars(answer) | {"pattern": pattern})

    adversary = {"name": "badnets", "clients": (2, 5), "round_every": 2}
    Rounds(shards, tmp_path, train=train, adversary=adversary).run(4)

    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("pattern-*")]
    assert found == ["round-00002/pattern-000002.npy"]


# --- privacy ---


def test_a_private_round_without_clients_is_noise_alone(shards: Path, tmp_path: Path):
    found = Rounds(shards, tmp_path, parts=2, privacy={"rate": 1e-9, "bound": 2.0})
    before = found.weights

    (record,) = found.run()

    assert (record.clients, record.images, record.loss) == ((), 0, 0.0)
    assert record.epsilon is not None
    scale = 2.0 / (1e-9 * CLIENTS)
    assert (found.weights - before).std() == pytest.approx(scale, rel=0.1)


def test_epsilon_grows_from_round_to_round(shards: Path, tmp_path: Path):
    spent = [r.epsilon for r in Rounds(shards, tmp_path, privacy={"rate": 0.5}).run(3)]

    assert spent == [1.0, 2.0, 3.0]


# --- sizes ---


def test_a_step_names_no_client_but_those_of_its_round(tmp_path: Path):
    sizes = []
    for clients in (10, 1000):
        shards = write(tmp_path / f"shards-{clients}", images=clients)
        told: list[str] = []
        found = Rounds(
            shards, tmp_path / f"{clients}", clients={"by": "patient", "per_round": 5}
        )  # fmt: skip
        found.server._executor = SimpleNamespace(
            parts=1, do=lambda step, parts, f=found, t=told: (
                t.append(json.dumps(step)), f.executor.do(step, parts))[1],
        )  # fmt: skip
        found.run(4)
        sizes.append(len(told[-1]))

    assert sizes[1] < sizes[0] + 100


@pytest.mark.parametrize("name", ["median", "krum", "alie"])
def test_the_server_reads_no_update_but_leaves_them_to_workers(
    shards: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server, "CHUNK", 1 << 16)  # a single slice, which the server might do
    found, answers = Rounds(shards, tmp_path, **SETTINGS[name]), []
    monkeypatch.setattr(found.server, "_own", None)
    do = found.executor.do
    monkeypatch.setattr(
        found.executor, "do", lambda *step: answers.append(do(*step)) or answers[-1]
    )

    found.run()

    an_update = len(json.dumps(found.weights.tolist()))
    assert max(len(json.dumps(answer)) for answer in answers) < an_update / 2


def test_what_travels_is_counted(shards: Path, tmp_path: Path):
    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config, **given)
        return answer if first_of(rows) else Answer(answer.weights * np.nan, 1, 1, 0.0, Memory())

    (record,) = (found := Rounds(shards, tmp_path, train=train)).run()

    vector = 4 * len(found.weights)
    assert (record.bytes_up, record.bytes_down) == ((CLIENTS - 1) * vector, CLIENTS * vector)
    assert record.images == sum(found.clients.counts[c] for c in record.clients)
    assert record.steps == 2 * (CLIENTS - 1)


def test_a_rule_refuses_fewer_clients_than_it_is_defined_for(shards: Path, tmp_path: Path):
    few = {"by": "dirichlet", "count": CLIENTS, "per_round": 3}

    with pytest.raises(UsageError, match="needs at least 7 clients"):
        Rounds(shards, tmp_path, aggregate="bulyan", clients=few).run()
