"""A round goes on without clients that fail, and an interrupted federation goes on as if not."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretended_rounds import (
    CLIENTS,
    SKEWED,
    Fails,
    Rounds,
    first_of,
    pretend,
    shards,
    tiny_networks_in_several_chunks,
)

from medspark.errors import RunError, UsageError
from medspark.federate import server
from medspark.federate.client import Answer, Memory
from medspark.federate.folder import FEDERATION_FILES, Overwriting
from medspark.ownership import remove

__all__ = ["shards", "tiny_networks_in_several_chunks"]


def broken(fault: str, who: set[int]) -> Any:
    """Return a way to train in which the clients with the first images ``who`` fail."""

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        answer = pretend(network, rows, task, config, **given)
        if first_of(rows) not in who:
            return answer
        if fault == "raises":
            raise ZeroDivisionError("no images\nand more")
        if fault == "is misused":
            raise UsageError("A client without images cannot train.")
        weights = {
            "nan": answer.weights * np.float32("nan"),
            "infinite": np.full_like(answer.weights, np.inf),
            "far": answer.weights + np.float32(1e6),
            "short": answer.weights[:-1],
        }[fault]
        return Answer(weights, len(rows), 1, 0.0, Memory(control=answer.memory.control))

    return train


FAULTS = {
    "raises": "ZeroDivisionError: no images",
    "is misused": "A client without images cannot train",
    "nan": "the update holds numbers that are not finite",
    "infinite": "the update holds numbers that are not finite",
    "far": "the update moves a weight by more than 4096",
    "short": "the answer has shape",
}


@pytest.mark.parametrize("aggregate", ["fedavg", "norm_clipping", "median"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_fails_is_named_and_leaves_no_bit_in_the_result(
    shards: Path, tmp_path: Path, fault: str, aggregate: str
):
    whole = Rounds(shards, tmp_path / "whole", aggregate=aggregate)
    who = {first_of(whole.rows(c)) for c in (2, 5)}
    without = Rounds(shards, tmp_path / "without", aggregate=aggregate)
    without.folder.leave_out(0, 2, "x")
    without.folder.leave_out(0, 5, "x")

    found = Rounds(shards, tmp_path / "f", train=broken(fault, who), aggregate=aggregate, parts=2)
    (record,) = found.run()

    without.run()
    assert set(record.left_out) == {2, 5}
    assert all(reason.startswith(FAULTS[fault]) for reason in record.left_out.values())
    assert record.clients == (0, 1, 3, 4, 6, 7)
    assert found.weights.tobytes() == without.weights.tobytes()


def test_a_round_with_too_few_answers_fails_and_says_who_was_left_out(shards: Path, tmp_path: Path):
    everybody = set(range(200))
    found = Rounds(
        shards, tmp_path, train=broken("nan", everybody), clients=SKEWED | {"least": 2}
    )  # fmt: skip

    with pytest.raises(
        RunError, match=r"Round 1 has 0 of the 2 usable .* Client 0 was left out: .* finite\."
    ):
        found.run()


def test_as_many_answers_as_asked_for_are_enough(shards: Path, tmp_path: Path):
    first = first_of(Rounds(shards, tmp_path / "look").rows(0))
    least = SKEWED | {"least": CLIENTS - 1}

    (record,) = Rounds(shards, tmp_path / "f", train=broken("nan", {first}), clients=least).run()

    assert len(record.clients) == CLIENTS - 1


def test_a_server_that_cannot_train_for_fltrust_says_so(shards: Path, tmp_path: Path):
    found = Rounds(shards, tmp_path, train=broken("raises", {200}), aggregate="fltrust")

    with pytest.raises(RunError, match=r"The server could not train .*: ZeroDivisionError"):
        found.run()


def test_left_out_controls_do_not_count(shards: Path, tmp_path: Path):
    who = {first_of(Rounds(shards, tmp_path / "look").rows(c)) for c in range(CLIENTS - 1)}
    moves: list[Any] = []

    def train(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        moves.append(pretend(network, rows, task, config, **given).control_change)
        return broken("nan", who)(network, rows, task, config, **given)

    found = Rounds(shards, tmp_path / "f", train=train, scaffold=True)
    found.run()

    assert np.allclose(found.folder.read(0, "control"), moves[-1] / CLIENTS, atol=1e-9)


# --- clients that end their task ---


def test_a_client_that_ended_its_task_twice_is_left_out_and_others_are_not(
    shards: Path, tmp_path: Path
):
    found = Rounds(shards, tmp_path)
    found.server._executor = asked = Fails()
    with pytest.raises(KeyboardInterrupt):
        found.run()
    with (found.folder.round(0) / "progress-00000.txt").open("a") as notes:
        notes.write("+3\n+3\n+4\n")

    done = found.executor.do(asked.step, 1)[0]["clients"]

    assert set(done) == {"0", "1", "2", "4", "5", "6", "7"}
    assert found.folder.left_out(0) == {3: "its task died 2 times while training it"}


def test_a_driver_that_is_killed_again_and_again_leaves_out_nobody(shards: Path, tmp_path: Path):
    for _ in range(3):
        killed = Rounds(shards, tmp_path, train=die)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
        with (killed.folder.round(0) / "progress-00000.txt").open("a") as notes:
            notes.write("+3\n")  # what a killed process leaves

    (record,) = Rounds(shards, tmp_path).run()

    assert record.left_out == {}


def die(*_: Any, **__: Any) -> Answer:
    raise KeyboardInterrupt


# --- going on ---

MODES = {
    "fedadam": {"aggregate": "fedadam"},
    "foolsgold": {"aggregate": "foolsgold"},
    "centre": {"aggregate": "centered_clipping"},
    "scaffold": {"scaffold": True},
    "neurotoxin": {"adversary": {"name": "neurotoxin", "clients": (1,)}},
    "private": {"privacy": {"rate": 0.7}},
}
SOME = SKEWED | {"per_round": 5}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_federation_that_goes_on_from_any_round_ends_with_the_same_bits(
    shards: Path, tmp_path: Path, mode: Any
):
    whole = Rounds(shards, tmp_path / "whole", clients=SOME, **mode)
    whole.run(4)
    for done in (1, 3):
        place = tmp_path / str(done)
        Rounds(shards, place, clients=SOME, **mode).run(done)

        found = Rounds(shards, place, clients=SOME, parts=3, **mode)
        found.run(4 - done)

        assert found.weights.tobytes() == whole.weights.tobytes()
        assert [r.clients for r in found.records] == [r.clients for r in whole.records]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@settings(
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kill=st.integers(0, 60), parts=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_a_federation_killed_at_any_write_goes_on_to_the_same_bits(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, mode: Any, kill: int, parts: Any
):
    whole = Rounds(shards, tmp_path_factory.mktemp("whole"), clients=SOME, **mode)
    whole.run(2)
    place = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        countdown = iter(range(kill))
        replace = Path.replace

        def killed(self: Path, target: Any) -> Any:
            if next(countdown, None) is None:
                raise KeyboardInterrupt
            return replace(self, target)

        patch.setattr(Path, "replace", killed)
        with suppress(KeyboardInterrupt):
            Rounds(shards, place, clients=SOME, parts=parts[0], **mode).run(2)

    found = Rounds(shards, place, clients=SOME, parts=parts[1], **mode)
    found.run(2 - len(found.records))

    assert found.weights.tobytes() == whole.weights.tobytes()
    assert files_of(place) == files_of(whole.folder.path) or parts != (1, 1)


def files_of(place: Path) -> set[str]:
    """Return the names of a federation's files, of whatever part."""
    names = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    return {re.sub(r"-\d{5}\.(npy|txt)$", r".\1", name) for name in names}


def test_parts_of_an_interrupted_attempt_are_not_joined_to_those_of_the_next(
    shards: Path, tmp_path: Path
):
    whole = Rounds(shards, tmp_path / "whole", aggregate="fedadam")
    whole.run()
    found = Rounds(shards, tmp_path / "f", aggregate="fedadam")
    for name in ("weights", "statefirst"):
        found.folder.round(0).mkdir(exist_ok=True)
        found.folder.write(0, name, 2, np.ones(256, dtype=np.float32))

    found.run()

    assert found.weights.tobytes() == whole.weights.tobytes()
    assert found.folder.read(0, "statefirst").shape == found.weights.shape


def test_who_was_left_out_stays_left_out_when_the_round_is_done_again(shards: Path, tmp_path: Path):
    who = {first_of(Rounds(shards, tmp_path / "look").rows(2))}
    first = Rounds(shards, tmp_path / "f", train=broken("nan", who))
    first.run()
    (first.folder.round(0) / "result.json").unlink()
    begun = first.folder.read(0, "weights")

    again = Rounds(shards, tmp_path / "f")
    (record,) = again.run()

    assert set(record.left_out) == {2}
    assert again.weights.tobytes() == begun.tobytes()


# --- what is left ---


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ({}, ["weights", "sum"]),
        ({"rounds": 3}, ["weights"]),
        ({"aggregate": "median"}, ["weights"]),
        ({"aggregate": "fedadam"}, ["weights", "statefirst", "statesecond", "sum"]),
        ({"aggregate": "centered_clipping"}, ["weights", "change"]),
        ({"aggregate": "fltrust"}, ["weights"]),
        ({"scaffold": True}, ["weights", "control", "sum", "controls"]),
        ({"scaffold": True, "rounds": 3}, ["weights", "control"]),
    ],
    ids=str,
)
def test_after_a_round_only_what_the_next_one_needs_is_left(
    shards: Path, tmp_path: Path, mode: Any, names: list[str]
):
    found = Rounds(shards, tmp_path, parts=2, **mode)
    found.run(3)

    arrays = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.npy")}
    assert {path.parts[0] for path in arrays} == {"round-00002"}
    assert {path.name.rsplit("-", 1)[0] for path in arrays} == set(names)
    memory = [path.name for path in (tmp_path / "memory").glob("*")]
    assert len(memory) == (CLIENTS if "scaffold" in mode else 0)


def test_sums_overwrite_the_files_of_the_round_before_and_never_those_of_another_part(
    shards: Path, tmp_path: Path
):
    found, inodes = Rounds(shards, tmp_path, parts=2), []
    for number in range(2):
        found.run()
        files = sorted((tmp_path / f"round-{number:05d}").glob("sum-*.npy"))
        inodes.append([file.stat().st_ino for file in files])

    assert inodes[0] == inodes[1]
    assert len(set(inodes[0])) == 2


def test_an_array_over_another_leaves_nothing_of_it(tmp_path: Path):
    written, (first, second) = Overwriting(), (tmp_path / "0/sum.npy", tmp_path / "1/sum.npy")
    for file, length in ((first, 9), (second, 4)):
        file.parent.mkdir()
        written.write(file, np.arange(length))

    assert list(tmp_path.rglob("*.npy")) == [second]
    assert np.load(second).tolist() == [0, 1, 2, 3]
    assert second.stat().st_size == 128 + 4 * 8
    second.unlink()
    written.write(first, np.arange(3))
    assert np.load(first).tolist() == [0, 1, 2]


def test_foolsgold_keeps_one_history_of_each_client(shards: Path, tmp_path: Path):
    found = Rounds(shards, tmp_path, aggregate="foolsgold", clients=SOME)
    found.run(4)

    histories = [p.name for p in tmp_path.rglob("history-*.npy")]
    seen = {client for record in found.records for client in record.clients}
    assert sorted(histories) == [f"history-{c:06d}-00000.npy" for c in sorted(seen)]


@pytest.mark.parametrize("mode", [*MODES.values(), {"aggregate": "fltrust"}], ids=str)
def test_overwrite_removes_all_files_of_a_federation_and_no_other(
    shards: Path, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server.Server, "_tidy", lambda *_: None)
    found = Rounds(shards, tmp_path / "f", train=broken("nan", {0}), **mode)
    found.run(2)
    found.folder.leave_out(1, -1, "x")
    (tmp_path / "f" / "round-00001" / "notes.npy").write_text("theirs")

    remove(tmp_path / "f", FEDERATION_FILES)

    left = [str(p.relative_to(tmp_path / "f")) for p in tmp_path.rglob("f/**/*") if p.is_file()]
    assert left == ["round-00001/notes.npy"]


def test_a_plan_and_a_result_are_json(shards: Path, tmp_path: Path):
    found = Rounds(shards, tmp_path)
    (record,) = found.run()

    plan = json.loads((tmp_path / "round-00000" / "plan.json").read_text())
    assert plan["total"] == record.images
    assert plan["groups"] == [list(record.clients)]
