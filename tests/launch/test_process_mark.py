"""A process is killed only if it carries the mark of the attempt."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from medspark.launch.ranks.attempt import _end_local_ranks
from medspark.launch.ranks.process_mark import MARK, belongs, mark_of
from medspark.launch.ranks.reports import Reports, Started
from medspark.launch.ranks.torchrun import WRAPPER

NONCE = "0123456789abcdef0123456789abcdef"
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a sleeping process, with or without a mark."""
    started: list[subprocess.Popen[bytes]] = []

    def run(mark: str | None = None, *words: str) -> subprocess.Popen[bytes]:
        code = "import time; print(flush=True); time.sleep(60)"
        environment = {key: value for key, value in os.environ.items() if key != MARK}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env=environment if mark is None else environment | {MARK: mark},
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def _report(folder: Path, rank_of: subprocess.Popen[bytes], *, nonce: str = NONCE) -> Reports:
    """Return reports in which a rank names that process as itself and as its sentinel."""
    reports = Reports(folder)
    reports.start(
        Started(
            rank=0,
            host=socket.gethostname(),
            pid=rank_of.pid,
            sentinel=rank_of.pid,
            nonce=nonce,
            threads=1,
            interface="lo",
            time=time.time() + 3600,
        )
    )
    return reports


def _lives(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(0.3)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_stranger_whom_a_forged_file_names_lives(start: Start, tmp_path: Path) -> None:
    stranger = start()

    _report(tmp_path, stranger).end_leftovers()

    assert _lives(stranger)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_of_the_attempt_is_ended_even_if_it_is_stopped(
    start: Start, tmp_path: Path, stopped: bool
) -> None:
    rank = start(mark_of(tmp_path, NONCE))
    if stopped:
        rank.send_signal(signal.SIGSTOP)
        os.waitpid(rank.pid, os.WUNTRACED)  # it has stopped, so that a signal can come too late

    _report(tmp_path, rank).end_leftovers()

    assert not _lives(rank)


@pytest.mark.parametrize(
    ("folder", "nonce"), [("another", NONCE), ("", "f" * 32), ("", ""), ("", NONCE[:-1])]
)
def test_a_process_of_another_attempt_lives(
    start: Start, tmp_path: Path, folder: str, nonce: str
) -> None:
    other = start(mark_of(tmp_path / folder, nonce))

    _report(tmp_path, other).end_leftovers()

    assert _lives(other)


def test_without_a_nonce_nobody_belongs(start: Start, tmp_path: Path) -> None:
    stranger = start()

    _report(tmp_path, stranger, nonce="").end_leftovers()

    assert _lives(stranger)


def test_a_process_of_another_machine_is_let_alone(start: Start, tmp_path: Path) -> None:
    rank = start(mark_of(tmp_path, NONCE))
    reports = _report(tmp_path, rank)
    reports.start(reports.started()[0].model_copy(update={"host": "elsewhere"}))

    reports.end_leftovers()

    assert _lives(rank)


def test_where_nobody_can_look_a_process_does_not_belong(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = mark_of(tmp_path, NONCE)
    process = psutil.Process(start(mark).pid)
    assert belongs(process, mark)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getuid", lambda: 12_345)
        assert not belongs(process, mark)
    monkeypatch.setattr(psutil.Process, "environ", _denied)

    assert not belongs(process, mark)


def _denied(self: psutil.Process) -> dict[str, str]:
    raise psutil.AccessDenied(self.pid)


def test_an_attempt_that_is_cancelled_ends_its_own_agents_alone(
    start: Start, tmp_path: Path
) -> None:
    mine = start(mark_of(tmp_path, NONCE), WRAPPER)
    other = start(mark_of(tmp_path / "other", NONCE), WRAPPER)
    not_an_agent = start(mark_of(tmp_path, NONCE))

    _end_local_ranks(mark_of(tmp_path, NONCE))

    assert [_lives(process) for process in (mine, other, not_an_agent)] == [False, True, True]
