"""From what the ranks left behind to one sentence that names the rank and the cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from medspark.launch.ranks.reports import Ended, Kind, Reports, Started, diagnose, lost_its_peers


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
