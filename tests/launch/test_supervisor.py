"""When the supervisor restarts a failed training and when it fails, without Spark and ranks."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medspark.config import Config
from medspark.errors import MedsparkError, RunError, UsageError
from medspark.launch import distributor
from medspark.launch.distributor import LaunchConfig, Task, run_ddp
from medspark.launch.ranks.reports import Failure
from medspark.spark.slots import Slots

LOST = Failure(rank=1, sentence="rank 1 was lost")
BUSY = Failure(rank=None, sentence="no rank started", traceback="EADDRINUSE")
MISUSE = Failure(rank=0, sentence="rank 0 raised it.", error="UsageError")
BUG = Failure(rank=0, sentence="rank 0 raised ImportError", error="ImportError")
DONE = {"total": 1}
Supervise = Callable[..., dict[str, Any]]


class Nothing(Config):
    """The configuration of a task that does nothing."""

    attempt: int = 0
    resume: str = "never"


class Script:
    """Outcomes of the attempts, whether each leaves a checkpoint first, and their orders."""

    def __init__(self, outcomes: Sequence[tuple[object, bool]], checkpoints: Path) -> None:
        self._outcomes: Iterator[tuple[object, bool]] = iter(outcomes)
        self._checkpoints = checkpoints
        self.orders: list[Any] = []

    def attempt(self, spark: object, order: Any, **_: object) -> Any:
        self.orders.append(order)
        outcome, progress = next(self._outcomes)

        def run(**_: object) -> object:
            if progress:
                (self._checkpoints / f"step-{len(self.orders):03d}").mkdir()
            return outcome

        started = {0: SimpleNamespace(time=0.0, host="here")}
        reports = SimpleNamespace(folder=Path("x"), started=lambda: started)
        return SimpleNamespace(run=run, reports=reports, launched_at=0.0)


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Return a function that runs attempts with ``outcomes`` and returns how the run ended."""
    spark: Any = SimpleNamespace(sparkContext=SimpleNamespace(master="local[2]"))
    monkeypatch.setattr(distributor, "wait_for", lambda *_, **__: Slots(2, 1, 2))

    def go(outcomes: Sequence[tuple[object, bool]], *, max_restarts: int) -> dict[str, Any]:
        (tmp_path / "checkpoints").mkdir()
        script = Script(outcomes, tmp_path / "checkpoints")
        monkeypatch.setattr(distributor, "Attempt", script.attempt)
        task = Task(
            function="x:y",
            config=Nothing(),
            run_dir=tmp_path,
            journal=tmp_path / "journal",
            checkpoints=tmp_path / "checkpoints",
        )
        launch = LaunchConfig(processes=2, max_restarts=max_restarts)
        try:
            result, launched = run_ddp(task, spark=spark, launch=launch)
        except MedsparkError as error:
            return {"error": error, "attempts": len(script.orders), "orders": script.orders}
        return {"result": result, "launched": launched, "orders": script.orders}

    return go


def test_a_run_that_gets_on_is_started_again_as_often_as_is_allowed(supervise: Supervise) -> None:
    found = supervise([(LOST, True), (LOST, True), (LOST, True), (DONE, True)], max_restarts=3)

    assert found["result"] == DONE
    assert (found["launched"].attempts, found["launched"].restarts) == (4, 3)


def test_a_run_is_not_started_again_more_often_than_allowed(supervise: Supervise) -> None:
    found = supervise([(LOST, True)] * 5, max_restarts=2)

    assert found["attempts"] == 3
    assert isinstance(found["error"], RunError)
    assert "after 2 restarts" in str(found["error"])


def test_two_failures_without_a_checkpoint_between_end_a_run(supervise: Supervise) -> None:
    found = supervise([(LOST, True), (LOST, False), (DONE, True)], max_restarts=9)

    assert found["attempts"] == 2
    assert "after 1 restart)" in str(found["error"])


def test_the_first_failure_is_never_taken_for_being_stuck(supervise: Supervise) -> None:
    assert supervise([(LOST, False), (DONE, True)], max_restarts=1)["result"] == DONE


@pytest.mark.parametrize(("failure", "kind"), [(MISUSE, UsageError), (BUG, RunError)])
def test_what_would_fail_again_is_not_tried_again(
    supervise: Supervise, failure: Failure, kind: type[Exception]
) -> None:
    found = supervise([(failure, True), (DONE, True)], max_restarts=9)

    assert found["attempts"] == 1
    assert isinstance(found["error"], kind)


def test_a_port_that_was_taken_costs_no_restart_but_once(supervise: Supervise) -> None:
    assert supervise([(BUSY, False), (DONE, True)], max_restarts=0)["launched"].restarts == 0


def test_a_port_that_stays_taken_is_a_failure(supervise: Supervise) -> None:
    assert supervise([(BUSY, False), (BUSY, False)], max_restarts=0)["attempts"] == 2


def test_attempts_after_the_first_go_on_from_the_checkpoint(supervise: Supervise) -> None:
    orders = supervise([(LOST, True), (DONE, True)], max_restarts=1)["orders"]

    assert [order.config["resume"] for order in orders] == ["never", "auto"]
    assert [order.config["attempt"] for order in orders] == [1, 2]
    assert [order.folder.name for order in orders] == ["0001", "0002"]


def test_nobody_else_opens_the_logs_of_the_attempts(supervise: Supervise, tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir(mode=0o755)  # of an earlier version

    supervise([(DONE, True)], max_restarts=0)

    assert stat.S_IMODE((tmp_path / "attempts").stat().st_mode) == 0o700
    assert (tmp_path / "attempts" / "0001").is_dir()


def test_a_run_folder_that_is_set_to_a_group_lets_its_ranks_in(
    supervise: Supervise, tmp_path: Path
) -> None:
    tmp_path.chmod(0o2775)

    supervise([(DONE, True)], max_restarts=0)

    assert stat.S_IMODE((tmp_path / "attempts").stat().st_mode) & 0o777 == 0o770
