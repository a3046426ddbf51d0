"""Work in pieces: each Spark task does one piece with torch, and files say which are done.

Where the work is killed, or a task fails, only the pieces that are missing are done the next time.
Evaluations are done this way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from pyspark.sql import SparkSession
from tqdm import tqdm

from medspark.errors import RunError
from medspark.memory import keep_freed_memory
from medspark.spark.session import is_local, task_errors

__all__ = ["Pieces", "do_pieces"]

_LOGGER = logging.getLogger(__name__)


class Pieces(Protocol):
    """Work in numbered pieces, each kept as a file. It travels to the tasks, so it is pickled."""

    @property
    def work(self) -> Path:
        """The folder of the files; every worker has to see it under this path."""

    @property
    def pieces(self) -> int:
        """The number of pieces."""

    def missing(self) -> list[int]:
        """Return the numbers of the pieces that are not done, or not whole."""

    def done(self) -> int:
        """Return how many units are done, as cheaply as can be: it is asked every second."""

    def do(self, number: int) -> None:
        """Do piece ``number`` and keep its file; two tasks may do the same piece at once."""


def do_pieces(spark: SparkSession, job: Pieces, *, total: int, unit: str, doing: str) -> None:
    """Do every piece of ``job`` that is missing, one in a Spark task, and show progress.

    The bar is called ``doing`` and counts ``job.done()`` of ``total`` in ``unit``. A task has as
    many torch threads as Spark gives it cores. Raises RunError where a task fails, or where pieces
    are still missing afterwards because the workers do not share the folder.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    missing = job.missing()
    if len(missing) < job.pieces:
        _LOGGER.info("%d of %d pieces are done already", job.pieces - len(missing), job.pieces)
    if missing:
        threads = int(spark.conf.get("spark.task.cpus", "1") or "1")
        with _progress(job, total=total, unit=unit, doing=doing), task_errors():
            spark.sparkContext.parallelize(missing, len(missing)).foreach(
                lambda number: _do_piece(job, number, threads)
            )
    if job.missing():
        where = "" if is_local(spark) else "; every worker has to see that folder"
        raise RunError(f"Pieces are missing in {job.work} although Spark did them{where}.")


def _do_piece(job: Pieces, number: int, threads: int) -> None:
    keep_freed_memory()
    # A worker of Spark is used again, for work that may want other threads.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        job.do(number)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(job: Pieces, *, total: int, unit: str, doing: str) -> Iterator[None]:
    """Show how many units are done: the files in the work folder tell."""
    stop = threading.Event()
    with tqdm(total=total, initial=job.done(), unit=unit, desc=doing) as bar:

        def advance() -> None:
            bar.update(max(job.done() - bar.n, 0))

        def follow() -> None:
            while not stop.wait(1.0):
                advance()

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            advance()
