"""Work in pieces: each Spark task does one piece with torch and stores it as a file.

After a crash or a failed task, the next run does only the missing pieces. Evaluations work this
way.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
from pyspark.sql import SparkSession

from medspark.errors import RunError
from medspark.memory import keep_freed_memory
from medspark.spark.cluster import is_local, task_cpus
from medspark.spark.progress import followed
from medspark.spark.session import task_errors
from medspark.spark.task import for_each

__all__ = ["Pieces", "do_pieces"]

_LOGGER = logging.getLogger(__name__)


class Pieces(Protocol):
    """Work in numbered pieces, each stored as a file. It is pickled to the tasks."""

    @property
    def work(self) -> Path:
        """The folder of the files. All workers must share it under this path."""

    @property
    def pieces(self) -> int:
        """The number of pieces."""

    def missing(self) -> list[int]:
        """Return the numbers of the pieces whose files are missing or incomplete."""

    def done(self) -> int:
        """Return how many units are done. It is called every second, so it must be cheap."""

    def do(self, number: int) -> None:
        """Do piece ``number`` and store its file. Two tasks may do the same piece at once."""


def do_pieces(spark: SparkSession, job: Pieces, *, total: int, unit: str, doing: str) -> None:
    """Do every missing piece of ``job``, one per Spark task, and show progress.

    The progress bar is labelled ``doing`` and counts ``job.done()`` of ``total`` in ``unit``. A
    task uses as many torch threads as Spark gives it cores. Raises RunError if a task fails, or if
    pieces are still missing afterwards because the workers do not share the folder.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    missing = job.missing()
    if len(missing) < job.pieces:
        _LOGGER.info("%d of %d pieces are done already", job.pieces - len(missing), job.pieces)
    if missing:
        threads = task_cpus(spark)
        with followed(job.done, total=total, unit=unit, doing=doing), task_errors():
            for_each(spark, missing, lambda number: _do_piece(job, number, threads))
    if job.missing():
        where = "" if is_local(spark) else "; all workers must share that folder"
        raise RunError(f"Pieces are missing in {job.work} although Spark did them{where}.")


def _do_piece(job: Pieces, number: int, threads: int) -> None:
    keep_freed_memory()
    # Spark reuses the worker for other work, so restore its number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        job.do(number)
    finally:
        torch.set_num_threads(before)
