"""Count Spark's task slots, before ranks start: without enough slots, Spark waits ten minutes."""

from __future__ import annotations

import logging
import os
import re
import time
from typing import NamedTuple

from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from medspark.errors import UsageError

__all__ = [
    "Slots",
    "check_settings",
    "local_slots",
    "slots_of",
    "submitted_master",
    "usual_ranks",
    "wait_for",
]

logger = logging.getLogger(__name__)

_LOCAL = re.compile(r"local(?:\[(\d+|\*)(?:,\d+)?\])?$")


class Slots(NamedTuple):
    """Numbers of tasks that can run at once, of executors, and of all cores."""

    tasks: int
    executors: int
    cores: int


def local_slots(master: str) -> int | None:
    """Return how many tasks a local ``master`` runs at once; None for a cluster."""
    match = _LOCAL.match(master)
    if not match:
        return None
    if match[1] == "*":
        return available_cores()
    return int(match[1] or 1)


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def submitted_master(configured: str | None) -> str:
    """Return the master that a new session would have, without starting one."""
    running = SparkSession.getActiveSession()
    if running is not None:
        return str(running.conf.get("spark.master", "local[*]"))
    if configured:
        return configured
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit has started a JVM
        SparkContext._ensure_initialized()  # SparkConf reads its settings from the JVM
        return SparkConf().get("spark.master", "local[*]") or "local[*]"
    return "local[*]"


def slots_of(spark: SparkSession, *, on_executors: bool = True) -> Slots:
    """Return the current slots of the executors of ``spark``, or of its driver."""
    context = spark.sparkContext
    local = local_slots(str(context.master))
    if local is None and not on_executors:
        cores = available_cores()
        return Slots(cores, 1, cores)
    task_cpus = int(str(spark.conf.get("spark.task.cpus", "1")))
    if local is not None:
        return Slots(local // task_cpus, 1, local)
    executors = context._jsc.sc().statusStore().executorList(True)
    workers = [executors.apply(index) for index in range(executors.size())]
    workers = [worker for worker in workers if worker.id() != "driver"]
    return Slots(
        sum(worker.maxTasks() for worker in workers),
        len(workers),
        sum(worker.totalCores() for worker in workers),
    )


def wait_for(spark: SparkSession, tasks: int, *, on_executors: bool, seconds: float) -> Slots:
    """Return the slots once there are enough for ``tasks``, at the latest after ``seconds``.

    A cluster's executors register one by one. A local master or the driver needs no waiting.
    """
    grows = on_executors and local_slots(str(spark.sparkContext.master)) is None
    deadline = time.monotonic() + seconds
    while True:
        slots = slots_of(spark, on_executors=on_executors)
        if slots.tasks >= tasks or not grows or time.monotonic() > deadline:
            return slots
        time.sleep(0.5)


def usual_ranks(slots: Slots, *, gpus: int) -> int:
    """Return the default number of ranks: two, if there are two slots and, with GPUs, two GPUs."""
    return max(1, min(2, slots.tasks, gpus or slots.tasks))


def check_settings(spark: SparkSession, *, gpu: bool) -> None:
    """Raise UsageError for Spark settings with which ranks cannot run on executors."""
    conf = spark.conf
    if _is_true(spark, "spark.dynamicAllocation.enabled"):
        raise UsageError(
            "All ranks start together, which Spark refuses with dynamic allocation: set "
            "spark.dynamicAllocation.enabled=false."
        )
    ignored = "pytorch.spark.distributor.ignoreSsl"
    encrypts = ("spark.ssl.enabled", "spark.network.crypto.enabled")
    if any(_is_true(spark, key) for key in encrypts) and not _is_true(spark, ignored):
        raise UsageError(
            "This cluster encrypts its traffic, but ranks exchange gradients unencrypted: give "
            f"--spark.settings.{ignored} true if that is allowed."
        )
    amount = str(conf.get("spark.task.resource.gpu.amount", "0"))
    # SPARK-41916: TorchDistributor 4.0 counts ranks wrongly for more than one.
    if gpu and amount != "1":
        raise UsageError(
            f"Each rank takes one GPU: set spark.task.resource.gpu.amount=1 (it is {amount})."
        )


def _is_true(spark: SparkSession, key: str) -> bool:
    return str(spark.conf.get(key, "false")).lower() == "true"
