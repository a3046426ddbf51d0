"""Facts about a session's cluster: its master, cores and settings.

A Connect session (Spark's client for a server, as on Databricks) has no SparkContext, no RDD and no
JVM in this process. This module alone knows the difference.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

__all__ = [
    "Shared", "available_cores", "default_parallelism", "end_jobs", "executor_slots", "is_connect",
    "is_local", "local_slots", "master_of", "running_session", "runs_here", "setting", "shared",
    "tag_jobs", "task_cpus",
]  # fmt: skip

_LOCAL = re.compile(r"local(?:\[(\d+|\*)(?:,\d+)?\])?$")
# Set by PySpark as long as it runs a Connect server in this process.
_OWN_SERVER = "SPARK_LOCAL_REMOTE"
Value = TypeVar("Value")
Shown = TypeVar("Shown", covariant=True)

# More rows than any cluster has cores.
_SPREAD_ROWS = 100_000


def is_connect(spark: SparkSession) -> bool:
    """Return whether ``spark`` is a Connect session."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def running_session() -> SparkSession | None:
    """Return the session that runs in this process, of either kind, or None.

    A classic session is found by the threads that have used it.
    """
    if not is_remote():
        return SparkSession.getActiveSession()
    try:
        return SparkSession.active()
    except PySparkRuntimeError:  # there is none
        return None


def setting(spark: SparkSession, key: str, default: str) -> str:
    """Return the Spark property ``key``, or ``default`` where it is not set or not told."""
    try:
        return str(spark.conf.get(key, default))
    except PySparkException:  # serverless Databricks tells few properties
        return default


def task_cpus(spark: SparkSession) -> int:
    """Return how many cores a task takes."""
    return int(setting(spark, "spark.task.cpus", "1"))


def master_of(spark: SparkSession) -> str:
    """Return Spark's master, such as local[2] or spark://HOST:7077."""
    if is_connect(spark):
        return setting(spark, "spark.master", "a Connect server")
    return str(spark.sparkContext.master)


def is_local(spark: SparkSession) -> bool:
    """Return whether driver and workers share one machine and one Python installation."""
    here = not is_connect(spark) or _OWN_SERVER in os.environ
    return here and runs_here(master_of(spark))


def runs_here(master: str) -> bool:
    """Return whether a classic session with ``master`` has its workers on this machine."""
    return master == "local" or master.startswith("local[")


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


def default_parallelism(spark: SparkSession) -> int:
    """Return the number of tasks into which Spark splits work: the cores, unless it is set.

    A Connect server does not tell the number, so a small query counts its tasks.
    """
    if not is_connect(spark):
        return int(spark.sparkContext.defaultParallelism)
    if is_local(spark) and (cores := local_slots(master_of(spark))):
        return cores
    number = F.spark_partition_id().alias("number")
    return int(spark.range(_SPREAD_ROWS).select(number).distinct().count())


def tag_jobs(spark: SparkSession, tag: str) -> None:
    """Tag the jobs that this thread starts from now on, so that any thread can end them.

    A classic session's own tags can be interrupted by the thread that added them only.
    """
    if is_connect(spark):
        spark.addTag(tag)
    else:
        spark.sparkContext.addJobTag(tag)


def end_jobs(spark: SparkSession, tag: str) -> None:
    """Cancel the running jobs that ``tag_jobs`` tagged."""
    if is_connect(spark):
        spark.interruptTag(tag)
    else:
        spark.sparkContext.cancelJobsWithTag(tag)


class Shared(Protocol[Shown]):
    """A value that tasks need."""

    @property
    def value(self) -> Shown:
        """The value."""


@dataclass(frozen=True)
class _Carried(Generic[Value]):
    value: Value


def shared(spark: SparkSession, value: Value) -> Shared[Value]:
    """Return ``value`` for tasks. A classic session broadcasts it to each executor once.

    Connect has no broadcasts: there it travels with every query.
    """
    return _Carried(value) if is_connect(spark) else spark.sparkContext.broadcast(value)


def executor_slots(spark: SparkSession) -> list[tuple[int, int]]:
    """Return for each executor of a cluster how many tasks it runs at once, and its cores.

    A Connect server does not list its executors: its cores count as executors of
    ``spark.executor.cores`` each, or as one.
    """
    if is_connect(spark):
        cores, cpus = default_parallelism(spark), task_cpus(spark)
        each = min(int(setting(spark, "spark.executor.cores", "0")) or cores, cores)
        return [(each // cpus, each)] * (cores // each)
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    workers = [executors.apply(index) for index in range(executors.size())]
    return [(w.maxTasks(), w.totalCores()) for w in workers if w.id() != "driver"]
