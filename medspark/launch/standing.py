"""Spark tasks that stay for many steps and keep their state, such as a network, between them.

A Spark job costs about a tenth of a second, as much as several rounds of a small federation. So one
job starts all tasks, and the driver hands them steps through files in a folder of its own that all
workers share:

    step-00000012.json          what to do, written by the driver
    answer-00000012-00003.json  the answer of part 3

Part i of a step is done by task i. If a task fails, Spark starts it again, and it does its part of
the current step again. If the whole job fails, it is started again, unless it failed at the same
step before. Tasks of a driver that was killed may live on for a while. They answer in their own
folder, so the next driver does not take their answers for its tasks', and end when it removes that
folder.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from pyspark.sql import SparkSession

from medspark import ownership
from medspark.errors import RunError
from medspark.files import DRAFT, write_whole
from medspark.memory import keep_freed_memory
from medspark.spark.cluster import end_jobs, tag_jobs, task_cpus
from medspark.spark.session import task_errors
from medspark.spark.task import for_each

__all__ = ["PartWorker", "StandingTasks", "standing_tasks"]

_LOGGER = logging.getLogger(__name__)

_END = {"kind": "end"}
_FILE = rf"\.?(step-\d{{8}}|answer-\d{{8}}-\d{{5}})\.json({DRAFT})?"
_FILES = (_FILE, rf"[0-9a-f]{{8}}/{_FILE}")  # earlier versions had no folder for each driver
_CLOSE_SECONDS = 10.0
# Waiting costs at most a hundredth of what it waited for, and few wake-ups.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.0005, 0.05
_WATCH_SECONDS = 0.25


class PartWorker(Protocol):
    """The work of a task, made once in each."""

    def do(self, step: dict[str, Any], part: int) -> dict[str, Any]:
        """Do one part of a step; return its answer. Both have the form of JSON."""


class StandingTasks:
    """The tasks of one job, as seen by the driver. ``standing_tasks`` starts them."""

    def __init__(
        self, spark: SparkSession, folder: Path, make: Callable[[], PartWorker], *, tasks: int
    ) -> None:
        self._spark = spark
        self._folder = folder
        self._make = make
        self._number = -1
        self._failed_at = -1
        self._error: RunError | None = None
        self._tag = f"medspark-{secrets.token_hex(4)}"
        self.parts = tasks
        self._thread = self._started()

    def do(self, step: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        """Have ``parts`` parts of ``step`` done; return their answers in order.

        Raises RunError if the tasks fail at this step again and again.
        """
        assert parts <= self.parts, "a task does one part"
        self._number += 1
        write_whole(self._step(self._number), json.dumps(step | {"parts": parts}))
        self._forget(self._number - 1)
        answers = [self._answer(part) for part in range(parts)]
        for pause in _pauses():
            answers = [path for path in answers if not path.exists()]
            if not answers:
                break
            if not self._thread.is_alive():
                self._restart()
            time.sleep(pause)
        return [json.loads(self._answer(part).read_text()) for part in range(parts)]

    def close(self) -> None:
        """End the tasks."""
        self._number += 1
        write_whole(self._step(self._number), json.dumps(_END))
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            end_jobs(self._spark, self._tag)
            self._thread.join()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="standing tasks", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        folder, make, threads = self._folder, self._make, task_cpus(self._spark)
        self._error = None
        try:
            with task_errors():
                tag_jobs(self._spark, self._tag)
                for_each(
                    self._spark,
                    range(self.parts),
                    lambda part: _serve(folder, part, make, threads),
                )
        except RunError as error:
            self._error = error

    def _restart(self) -> None:
        cause = self._error or RunError("The Spark job ended before its work.")
        if self._failed_at == self._number:
            raise cause
        self._failed_at = self._number
        _LOGGER.warning("starting the tasks again: %s", cause)
        self._thread = self._started()

    def _step(self, number: int) -> Path:
        return self._folder / f"step-{number:08d}.json"

    def _answer(self, part: int) -> Path:
        return self._folder / f"answer-{self._number:08d}-{part:05d}.json"

    def _forget(self, number: int) -> None:
        for path in self._folder.glob(f"*-{number:08d}*"):
            path.unlink(missing_ok=True)


@contextmanager
def standing_tasks(
    spark: SparkSession, work: Path, make: Callable[[], PartWorker], *, tasks: int
) -> Iterator[StandingTasks]:
    """Yield ``tasks`` tasks that each ``make`` their worker; they end with the block.

    ``work`` is a folder that all workers share. The files of steps are below its subfolder
    ``tasks``, and are removed before and after.
    """
    everybody = work / "tasks"
    ownership.remove(everybody, _FILES)
    folder = everybody / secrets.token_hex(4)
    folder.mkdir(parents=True)
    crew = StandingTasks(spark, folder, make, tasks=tasks)
    try:
        yield crew
    finally:
        crew.close()
        ownership.remove(everybody, _FILES)


def _serve(folder: Path, part: int, make: Callable[[], PartWorker], threads: int) -> None:
    """Do this task's parts of all steps, from the current one to the last."""
    keep_freed_memory()
    # Spark reuses the worker for other work, so restore its number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    over = threading.Event()
    threading.Thread(target=_watch, args=(folder, over), name="watch", daemon=True).start()
    try:
        worker = make()
        for number, step in _steps(folder):
            answer = folder / f"answer-{number:08d}-{part:05d}.json"
            if part < step["parts"] and not answer.exists():
                done = json.dumps(worker.do(step, part))
                with suppress(FileNotFoundError):  # the driver has ended, and removed the folder
                    write_whole(answer, done)
    finally:
        over.set()
        torch.set_num_threads(before)


def _watch(folder: Path, over: threading.Event) -> None:
    """End this process if the folder goes before the work is over: another driver is at work."""
    while not over.wait(_WATCH_SECONDS):
        if not folder.is_dir():
            os._exit(1)


def _steps(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the newest step and its number, again and again, until the driver ends or has gone.

    Steps in which a task has no part may be over before it looks, so they can be missing.
    """
    parent, done = os.getppid(), -1
    while True:
        for pause in _pauses():
            newest = _newest(folder)
            if newest > done:
                break
            if os.getppid() != parent or not folder.is_dir():
                return
            time.sleep(pause)
        with suppress(FileNotFoundError):
            step = json.loads((folder / f"step-{newest:08d}.json").read_text())
            if step == _END:
                return
            yield newest, step
            done = newest


def _newest(folder: Path) -> int:
    steps = folder.glob("step-" + 8 * "[0-9]" + ".json")
    return max((int(path.stem.split("-")[1]) for path in steps), default=-1)


def _pauses() -> Iterator[float]:
    began = time.monotonic()
    while True:
        yield min(max(_SHORTEST_WAIT, (time.monotonic() - began) / 100), _LONGEST_WAIT)
