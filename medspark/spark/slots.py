"""Count Spark's task slots, before ranks start: without enough slots, Spark waits ten minutes."""

from __future__ import annotations

import logging
import os
import time
from typing import NamedTuple

from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from medspark.errors import UsageError
from medspark.spark.cluster import (
    available_cores,
    executor_slots,
    is_local,
    local_slots,
    master_of,
    running_session,
    setting,
    task_cpus,
)

__all__ = ["Slots", "check_settings", "slots_of", "submitted_master", "usual_ranks", "wait_for"]

logger = logging.getLogger(__name__)


class Slots(NamedTuple):
    """Numbers of tasks that can run at once, of executors, and of all cores."""

    tasks: int
    executors: int
    cores: int


def submitted_master(configured: str | None) -> str:
    """Return the master that a new session would have, without starting one."""
    running = running_session()
    if running is not None:
        return master_of(running)
    if remote := os.environ.get("SPARK_REMOTE"):
        return remote
    if configured:
        return configured
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit has started a JVM
        SparkContext._ensure_initialized()  # SparkConf reads its settings from the JVM
        return SparkConf().get("spark.master", "local[*]") or "local[*]"
    return "local[*]"


def slots_of(spark: SparkSession, *, on_executors: bool = True) -> Slots:
    """Return the current slots of the executors of ``spark``, or of its driver."""
    local = local_slots(master_of(spark)) if is_local(spark) else None
    if local is None and not on_executors:
        cores = available_cores()
        return Slots(cores, 1, cores)
    if local is not None:
        return Slots(local // task_cpus(spark), 1, local)
    executors = executor_slots(spark)
    return Slots(sum(tasks for tasks, _ in executors), len(executors),
                 sum(cores for _, cores in executors))  # fmt: skip


def wait_for(spark: SparkSession, tasks: int, *, on_executors: bool, seconds: float) -> Slots:
    """Return the slots once there are enough for ``tasks``, at the latest after ``seconds``.

    A cluster's executors register one by one. A local master or the driver needs no waiting.
    """
    grows = on_executors and not is_local(spark)
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
    amount = setting(spark, "spark.task.resource.gpu.amount", "0")
    # SPARK-41916: TorchDistributor 4.0 counts ranks wrongly for more than one.
    if gpu and amount != "1":
        raise UsageError(
            f"Each rank takes one GPU: set spark.task.resource.gpu.amount=1 (it is {amount})."
        )


def _is_true(spark: SparkSession, key: str) -> bool:
    return setting(spark, key, "false").lower() == "true"
