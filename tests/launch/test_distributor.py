"""The supervisor: verified success, named failures, restarts, and no leftover process."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pyspark.ml.torch.log_communication import LogStreamingServer

from medspark.errors import RunError, UsageError
from medspark.launch import distributor
from medspark.launch.distributor import LaunchConfig
from medspark.launch.ranks.network import choose_interface
from medspark.launch.ranks.reports import Failure, Reports
from medspark.spark.slots import Slots
from medspark.track.journal import JournalReader

pytestmark = [pytest.mark.spark, pytest.mark.ddp, pytest.mark.slow]

Run = Callable[..., Any]
ON_EXECUTORS = LaunchConfig(processes=2, where="executors", timeout_seconds=8)
ON_DRIVER = LaunchConfig(processes=2, timeout_seconds=5)


def _ranks_left() -> list[psutil.Process]:
    """Return processes of ranks that still run after a short wait."""
    deadline = time.monotonic() + 10
    while True:
        left = [
            process
            for process in psutil.Process().children(recursive=True)
            if any(part.endswith("train.py") for part in _command(process))
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_ranks_on_the_driver_return_what_rank_0_found(run: Run, tmp_path: Path) -> None:
    result, launched = run(steps=3, trouble="rubbish")

    assert result["total"] == 9.0
    assert result["threads"] == [1, 1] or os.cpu_count() != 2
    assert (launched.processes, launched.on_executors, launched.attempts) == (2, False, 1)
    assert [record.step for record in JournalReader(tmp_path / "journal").poll()] == [0, 1, 2]
    started = Reports(tmp_path / "attempts" / "0001").started()
    assert {report.interface for report in started.values()} == {choose_interface("127.0.0.1")}
    assert _ranks_left() == []


def test_ranks_on_executors_return_the_same_and_the_driver_serves_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[object] = []
    monkeypatch.setattr(LogStreamingServer, "start", lambda *given, **_: servers.append(given))

    result, launched = run(steps=3, launch=ON_EXECUTORS)

    assert result["total"] == 9.0
    assert launched.on_executors
    assert servers == []  # PySpark's server prints everything sent to it


def test_one_process_takes_the_threads_it_is_told(run: Run) -> None:
    result, _ = run(steps=1, launch=LaunchConfig(processes=1, threads_per_process=1))

    assert (result["world"], result["threads"]) == (1, [1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no mallopt")
def test_a_rank_keeps_the_memory_that_it_frees(run: Run) -> None:
    result, _ = run(steps=1, launch=LaunchConfig(processes=1))

    assert result["page_faults"] < 100


def test_a_rank_that_raises_is_named_with_its_traceback(run: Run) -> None:
    with pytest.raises(RunError, match=r"rank 1 on .* raised ValueError: the scanner is on") as it:
        run(trouble="raise")

    assert "_TROUBLES[config.trouble](config)" in str(it.value)
    assert _ranks_left() == []


@pytest.mark.parametrize(
    ("launch", "trouble", "cause"),
    [
        (ON_DRIVER, "sigkill", r"rank 1 on \S+ \(process \d+\) was killed by SIGKILL"),
        (ON_DRIVER, "sigstop", r"rank 1 .* was stopped \(SIGSTOP\)"),
        # On one machine all ranks share an agent, and lose it together.
        (ON_DRIVER, "kill_agent", "rank [01] .* lost the torchrun agent above it"),
        (ON_EXECUTORS, "kill_agent", "rank 1 .* lost the torchrun agent above it"),
    ],
    ids=["driver-sigkill", "driver-sigstop", "driver-agent", "executors-agent"],
)
def test_a_rank_that_dies_ends_the_run_soon_and_is_named(
    run: Run, launch: LaunchConfig, trouble: str, cause: str
) -> None:
    began = time.monotonic()

    with pytest.raises(RunError, match=cause):
        run(trouble=trouble, launch=launch)

    assert time.monotonic() - began < 110
    assert _ranks_left() == []


def test_a_killed_rank_is_started_again_from_the_checkpoint(run: Run) -> None:
    launch = LaunchConfig(processes=2, max_restarts=1)

    result, launched = run(steps=4, trouble="sigkill_once", trouble_step=2, launch=launch)

    assert result["total"] == 12.0
    assert (result["first"], result["attempt"]) == (2, 2)
    assert (launched.attempts, launched.restarts) == (2, 1)


def test_a_run_that_gets_nowhere_is_given_up(run: Run) -> None:
    launch = LaunchConfig(processes=2, max_restarts=9)

    with pytest.raises(RunError, match=r"the scanner is on fire.*after 1 restart"):
        run(trouble="raise", launch=launch)


def test_misuse_that_a_rank_finds_is_still_misuse(run: Run) -> None:
    launch = LaunchConfig(processes=2, max_restarts=9)

    with pytest.raises(UsageError, match=r"^The shard x.parquet is missing\.$"):
        run(trouble="misuse", launch=launch)


def test_more_ranks_than_slots_are_refused_at_once(run: Run) -> None:
    began = time.monotonic()

    with pytest.raises(UsageError, match=r"processes is 3, but local\[2.* has 2 slots"):
        run(launch=LaunchConfig(processes=3))

    assert time.monotonic() - began < 5


def even(available: int) -> int:
    """Return the most ranks that can share four virtual shards."""
    return max(count for count in (1, 2, 4) if count <= available)


def test_as_many_ranks_as_can_share_the_work_start_where_nobody_says(run: Run) -> None:
    result, launched = run(steps=1, launch=LaunchConfig(), most_ranks=lambda _: 1)

    assert (result["world"], launched.processes) == (1, 1)


@pytest.mark.parametrize(("fewest", "gone_on"), [(1, [4, 2]), (3, [4])])
def test_after_a_loss_as_many_ranks_go_on_as_can_share_the_work(
    fewest: int, gone_on: list[int], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, started = iter([4, 3, 0]), []

    class Lost:
        def __init__(self, *_: object, processes: int, **__: object) -> None:
            started.append(processes)
            self.reports = SimpleNamespace(folder=Path("logs"))

        def run(self, **_: object) -> Failure:
            return Failure(rank=3, sentence="a machine is gone")

    monkeypatch.setattr(distributor, "Attempt", Lost)
    monkeypatch.setattr(distributor, "wait_for", lambda *_, **__: Slots(next(room), 1, 4))
    launch = LaunchConfig(processes=4, max_restarts=1, min_processes=fewest)

    with pytest.raises(RunError, match="slots left" if fewest == 3 else "a machine is gone"):
        run(launch=launch, most_ranks=even)

    assert started == gone_on
