"""Supervise TorchDistributor: check the slots, watch the ranks, report failures, restart.

TorchDistributor alone reports success for a failed script, does not say why a rank failed, waits
ten minutes for missing slots and half an hour for a stuck rank, and never restarts. Here a run
succeeds only when rank 0 has written its result.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pyspark.sql import SparkSession

from medspark.config import Config
from medspark.errors import MedsparkError, RunError, UsageError
from medspark.launch.ranks.attempt import Attempt, Interrupted, new_nonce
from medspark.launch.ranks.rank import Order
from medspark.launch.ranks.reports import Failure
from medspark.spark.cluster import (
    available_cores,
    is_local,
    local_slots,
    master_of,
    task_cpus,
)
from medspark.spark.ship import package_zip
from medspark.spark.slots import Slots, check_settings, submitted_master, usual_ranks, wait_for

__all__ = ["SPARK_SETTINGS", "LaunchConfig", "Launched", "Task", "check_room", "run_ddp"]

logger = logging.getLogger(__name__)

# Settings that a session needs from its start for ranks on executors. Spark's defaults are 40
# checks of 15 s for missing slots, and a year for a barrier.
SPARK_SETTINGS = {
    "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "3",
    "spark.barrier.sync.timeout": "600",
}
_ROOM_SECONDS = 30.0
_ROOM_AFTER_FAILURE_SECONDS = 12.0
_GROWTH_CHECK_SECONDS = 5.0


class LaunchConfig(Config):
    """Number and place of the training processes (ranks), and restarts after failures."""

    processes: int = Field(
        0,
        ge=0,
        description="ranks, one process each; 0: two if there are two slots and, with GPUs, two "
        "GPUs",
    )
    threads_per_process: int = Field(
        0, ge=0, description="torch threads of each rank; 0: the cores divided by the ranks"
    )
    where: Literal["auto", "driver", "executors"] = Field(
        "auto",
        description="driver: on this machine; executors: one Spark task per rank; auto: executors "
        "if the master is a cluster",
    )
    gpu: bool = Field(False, description="give each rank one of the GPUs that Spark manages")
    ddp: bool = Field(
        True,
        description="false: one process without DDP, the baseline of scaling measurements",
    )
    timeout_seconds: float = Field(
        120, gt=0, description="seconds that a rank waits for the others before it fails"
    )
    start_seconds: float = Field(300, gt=0, description="seconds within which the ranks must start")
    max_restarts: int = Field(
        0, ge=0, description="most restarts of a failed training from its checkpoint"
    )
    min_processes: int = Field(
        1, ge=1, description="fewest ranks to continue with after machines were lost"
    )


class Task(Config):
    """The work of the ranks: ``function`` (``module:name``) of (config, world, journal).

    If ``config`` has the keys ``attempt`` and ``resume``, they are set for every attempt. New
    entries in ``checkpoints`` count as progress: the run fails after two failures without any.
    ``most_ranks`` returns, for a number of available ranks, how many of them can share the work.
    """

    function: str
    config: Config
    run_dir: Path
    journal: Path
    checkpoints: Path
    most_ranks: Callable[[int], int] = int


class Launched(Config):
    """How the last attempt of a run was launched."""

    processes: int
    threads: int
    on_executors: bool
    attempts: int
    restarts: int
    hosts: tuple[str, ...]
    launched_at: float = Field(description="seconds since 1970, of the last attempt")
    ranks_at: float = Field(description="seconds since 1970, when its last rank had started")


def check_room(launch: LaunchConfig, master: str | None) -> None:
    """Raise UsageError if the ranks run on this machine and it has fewer slots than ranks.

    This needs no Spark session. A cluster's slots are known only once a session runs.
    """
    if not launch.ddp and launch.processes != 1:
        raise UsageError("launch.ddp false needs one process: give --launch.processes 1.")
    where = submitted_master(master)
    slots, owner = local_slots(where), f"Spark's master {where}"
    if slots is None and launch.where == "driver":
        slots, owner = available_cores(), "the driver"
    if slots is not None and launch.processes > slots:
        raise UsageError(
            f"launch.processes is {launch.processes}, but {owner} has {_count(slots, 'slot')} on "
            "this machine."
        )


def run_ddp(
    task: Task, *, spark: SparkSession, launch: LaunchConfig
) -> tuple[dict[str, Any], Launched]:
    """Run ``task`` on every rank; return rank 0's return value, and how the run was launched.

    The return value must be a JSON document. Raises UsageError if there are too few slots or a
    rank raised one, and RunError that names the rank and the cause if training failed.
    """
    return _Supervisor(task, spark, launch).run()


class _Supervisor:
    """Starts attempts until one succeeds, or no further attempt is allowed or can help."""

    def __init__(self, task: Task, spark: SparkSession, launch: LaunchConfig) -> None:
        self._task = task
        self._spark = spark
        self._launch = launch
        self._package = package_zip()
        self._on_executors = launch.where == "executors" or (
            launch.where == "auto" and not is_local(spark)
        )
        if self._on_executors:
            check_settings(spark, gpu=launch.gpu)
        self._wanted = launch.processes or 2
        self._attempts = self._restarts = 0
        self._growth_checked = 0.0

    def run(self) -> tuple[dict[str, Any], Launched]:
        """Return the outcome of the attempt that succeeds."""
        slots = self._room(_ROOM_SECONDS)
        if self._launch.processes == 0:
            # Ranks on executors see the GPUs that Spark gives them.
            gpus = 0 if self._on_executors else _gpus()
            self._wanted = self._task.most_ranks(usual_ranks(slots, gpus=gpus))
        if slots.tasks < self._wanted:
            raise UsageError(_no_room(self._wanted, slots, self._spark))
        failed_at: str | None = None
        while True:
            processes = self._task.most_ranks(min(self._wanted, slots.tasks))
            attempt, threads = self._prepare(processes, slots)
            began_at = self._newest_checkpoint()
            try:
                outcome = attempt.run(
                    start_seconds=self._launch.start_seconds,
                    interrupt=lambda p=processes, at=began_at: self._can_grow(p, at),  # type: ignore[misc]
                )
            except Interrupted:
                logger.warning("machines are back: continuing with more processes")
            else:
                if not isinstance(outcome, Failure):
                    return outcome, self._launched(attempt, processes, threads)
                self._count_failure(outcome, attempt, stuck=self._newest_checkpoint() == failed_at)
                failed_at = self._newest_checkpoint()
            slots = self._room(_ROOM_AFTER_FAILURE_SECONDS)
            if self._task.most_ranks(slots.tasks) < self._launch.min_processes:
                raise RunError(f"{_count(slots.tasks, 'slot')} left, too few to continue.")

    def _room(self, seconds: float) -> Slots:
        return wait_for(self._spark, self._wanted, on_executors=self._on_executors, seconds=seconds)

    def _prepare(self, processes: int, slots: Slots) -> tuple[Attempt, int]:
        self._attempts += 1
        folder, number = _new_folder(self._task.run_dir)
        threads = self._launch.threads_per_process or _threads(processes, slots)
        logger.info("%d processes with %d threads each", processes, threads)
        order = Order(
            function=self._task.function,
            config_class=_name(type(self._task.config)),
            config=_for_attempt(self._task.config, number, again=self._attempts > 1),
            folder=folder,
            journal=self._task.journal.resolve(),
            nonce=new_nonce(),
            threads=threads,
            timeout_seconds=self._launch.timeout_seconds,
            alone=not self._launch.ddp,
        )
        attempt = Attempt(
            self._spark,
            order,
            package=self._package,
            processes=processes,
            on_executors=self._on_executors,
            gpu=self._launch.gpu,
        )
        return attempt, threads

    def _count_failure(self, failure: Failure, attempt: Attempt, *, stuck: bool) -> None:
        """Raise the failure as an error unless another attempt is allowed and may help."""
        if failure.port_taken and self._attempts == 1:
            logger.warning("another process took the ranks' port: starting again")
            return
        given_up = self._restarts >= self._launch.max_restarts
        if failure.hopeless or given_up or (stuck and self._restarts > 0):
            raise _as_error(failure, attempt.reports.folder, self._restarts)
        self._restarts += 1
        logger.warning(
            "%s; restart %d of %d", failure.sentence, self._restarts, self._launch.max_restarts
        )

    def _can_grow(self, processes: int, began_at: str) -> bool:
        """Return whether lost machines are back and a new checkpoint makes a restart cheap."""
        now = time.monotonic()
        if processes == self._wanted or now - self._growth_checked < _GROWTH_CHECK_SECONDS:
            return False
        self._growth_checked = now
        room = self._room(0).tasks >= self._wanted
        return room and self._newest_checkpoint() != began_at

    def _newest_checkpoint(self) -> str:
        return max((path.name for path in self._task.checkpoints.glob("step-*")), default="")

    def _launched(self, attempt: Attempt, processes: int, threads: int) -> Launched:
        started = attempt.reports.started()
        return Launched(
            launched_at=attempt.launched_at,
            ranks_at=max(report.time for report in started.values()),
            processes=processes,
            threads=threads,
            on_executors=self._on_executors,
            attempts=self._attempts,
            restarts=self._restarts,
            hosts=tuple(started[rank].host for rank in sorted(started)),
        )


def _new_folder(run_dir: Path) -> tuple[Path, int]:
    """Create the folder of the next attempt, with a number above all earlier ones; return both.

    Only the user who trains can open logs and tracebacks. If ``run_dir`` has the set-group-ID
    bit, members of its group can too, since ranks on other machines may run as one of them.
    """
    attempts = run_dir.resolve() / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    above = attempts.parent.stat().st_mode
    group = above & 0o070 if above & stat.S_ISGID else 0
    with suppress(OSError):  # some mounts have no file modes
        attempts.chmod(0o700 | group)
    names = [path.name for path in attempts.iterdir()]
    number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
    folder = attempts / f"{number:04d}"
    folder.mkdir()
    return folder, number


def _for_attempt(config: Config, number: int, *, again: bool) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    if "attempt" in values:
        values["attempt"] = number
    if again and "resume" in values:
        values["resume"] = "auto"
    return values


def _threads(processes: int, slots: Slots) -> int:
    per_executor = slots.cores // max(1, slots.executors)
    return max(1, min(slots.cores // processes, per_executor))


def _gpus() -> int:
    """Return how many GPUs this machine has."""
    import torch  # imported here because it takes seconds

    return torch.cuda.device_count()


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _no_room(wanted: int, slots: Slots, spark: SparkSession) -> str:
    return (
        f"launch.processes is {wanted}, but {master_of(spark)} has "
        f"{_count(slots.tasks, 'slot')}: {_count(slots.executors, 'executor')} with "
        f"{_count(slots.cores, 'core')} in all, and spark.task.cpus is "
        f"{task_cpus(spark)}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _as_error(failure: Failure, folder: Path, restarts: int) -> MedsparkError:
    if failure.error == "UsageError":
        return UsageError(failure.sentence.partition(" raised ")[2] or failure.sentence)
    after = f" (after {_count(restarts, 'restart')})" if restarts else ""
    text = f"{failure.sentence}{after}. The ranks' logs are in {folder}."
    return RunError(f"{text}\n{failure.traceback}".rstrip())
