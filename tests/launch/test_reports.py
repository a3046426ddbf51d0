"""The diagnosis from reports: one sentence that names the rank and the cause."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.launch.ranks.reports import (
    Ended,
    Failure,
    Kind,
    Reports,
    Started,
    diagnose,
    lost_its_peers,
)


def _began(reports: Reports, *ranks: int) -> None:
    for rank in ranks:
        reports.start(
            Started(
                rank=rank,
                host=f"node-{rank}",
                pid=2**22 + rank,  # above Linux's largest process number
                sentinel=2**22 + 10 + rank,
                nonce="",
                threads=1,
                interface="eth0",
                time=0,
            )
        )


def _ended(reports: Reports, rank: int, kind: Kind, cause: str = "", time: float = 0) -> None:
    reports.end(Ended(rank=rank, kind=kind, cause=cause, time=time))


def test_an_exception_is_the_cause_even_if_another_rank_noticed_first(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1)
    _ended(reports, 0, "lost_peers", "Connection closed by peer", time=1)
    _ended(reports, 1, "error", "ValueError: bad pixel", time=2)

    failure = diagnose(reports, 2, None)

    assert failure.rank == 1
    assert failure.sentence == "rank 1 on node-1 (process 4194305) raised ValueError: bad pixel"


KINDS: tuple[Kind, ...] = ("error", "killed", "agent_lost", "lost_peers", "terminated", "ok")
# Ends of the ranks, at distinct times.
ENDS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 99)),
    min_size=1, max_size=5, unique_by=lambda end: end[1],
)  # fmt: skip


@given(ENDS)
def test_the_cause_is_blamed_before_its_consequences_and_the_first_of_several(
    ends: list[tuple[Kind, int]],
) -> None:
    with tempfile.TemporaryDirectory() as place:
        reports = Reports(Path(place))
        _began(reports, *range(len(ends)))
        for rank, (kind, time) in enumerate(ends):
            _ended(reports, rank, kind, time=time)

        failure = diagnose(reports, len(ends), None)

    rank_of = {"error": 0, "killed": 1, "agent_lost": 2}
    guilty = min(ends, key=lambda end: (rank_of.get(end[0], 3), end[1]))
    assert failure.rank == ends.index(guilty)


def test_of_ranks_that_lost_each_other_the_first_is_named_with_what_it_saw(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1, 2)
    for rank, time in ((0, 3), (1, 1), (2, 2)):
        _ended(reports, rank, "lost_peers", f"no answer at {time}", time=time)

    failure = diagnose(reports, 3, None)

    assert failure.sentence == (
        "rank 1 on node-1 (process 4194305) lost its connection to the other ranks: no answer at 1"
    )


def test_a_rank_that_never_began_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 1)
    _ended(reports, 1, "lost_peers", "Timed out waiting")

    assert diagnose(reports, 2, None).sentence.startswith("rank 0 did not start, while others did")


@pytest.mark.parametrize(
    ("traceback", "taken"),
    [("OSError: EADDRINUSE", True), ("Address already in use", True), ("address", False)],
)
def test_a_port_that_somebody_took_is_recognised(traceback: str, taken: bool) -> None:
    assert Failure(rank=0, sentence="", traceback=traceback).port_taken == taken


def test_what_a_rank_raised_travels_with_the_failure(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0)
    ended = Ended(rank=0, kind="error", time=0, error="ValueError", cause="x", traceback="line 7")
    reports.end(ended)

    failure = diagnose(reports, 1, None)

    assert (failure.error, failure.traceback, failure.rank) == ("ValueError", "line 7", 0)


def test_a_signal_is_named(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1)
    _ended(reports, 0, "killed", "was killed by SIGKILL")
    _ended(reports, 1, "lost_peers", "Connection reset by peer")

    assert diagnose(reports, 2, None).sentence.endswith("was killed by SIGKILL")


def test_a_rank_without_a_last_word_is_the_one_that_was_killed(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1)
    _ended(reports, 0, "lost_peers", "Connection closed by peer")

    failure = diagnose(reports, 2, None)

    assert failure.rank == 1
    assert "was killed (SIGKILL)" in failure.sentence


def test_a_stopped_rank_is_blamed_rather_than_those_who_waited_for_it(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1)
    reports.stop(0, stopped=True)
    _ended(reports, 0, "agent_lost", "lost its agent")
    _ended(reports, 1, "lost_peers", "Timed out waiting 8000ms for recv operation")

    failure = diagnose(reports, 2, None)

    assert (failure.rank, "SIGSTOP" in failure.sentence) == (0, True)


def test_a_rank_that_went_on_after_a_stop_is_not_blamed(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0, 1)
    reports.stop(0, stopped=True)
    reports.stop(0, stopped=False)
    _ended(reports, 1, "error", "ValueError: bad pixel")

    assert diagnose(reports, 2, None).rank == 1


def test_ranks_that_never_began_point_to_the_workers_and_the_shared_folder(tmp_path: Path) -> None:
    failure = diagnose(Reports(tmp_path), 2, RuntimeError("No module named 'torch'"))

    assert str(tmp_path) in failure.sentence
    assert "torch" in failure.traceback


@pytest.mark.parametrize(("error", "hopeless"), [("UsageError", True), ("OSError", False)])
def test_misuse_is_not_worth_another_attempt(tmp_path: Path, error: str, hopeless: bool) -> None:
    reports = Reports(tmp_path)
    _began(reports, 0)
    reports.end(Ended(rank=0, kind="error", time=0, error=error, cause="x"))

    assert diagnose(reports, 1, None).hopeless is hopeless


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:24482",
        "[gloo/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete",
        "NCCL communicator was aborted",
    ],
)
def test_what_torch_says_about_a_lost_peer_is_recognised(message: str) -> None:
    assert lost_its_peers(RuntimeError(message))


def test_an_ordinary_error_is_not_taken_for_a_lost_peer() -> None:
    assert not lost_its_peers(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))


def test_a_file_half_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"rank": 0, "ki')

    assert Reports(tmp_path).ended() == {}
