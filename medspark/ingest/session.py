"""The Spark session that every job works in: found or made, quiet, and able to import medspark."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pydantic import Field
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from medspark.config import Config
from medspark.errors import RunError
from medspark.ingest.ship import package_file

_LOGGER = logging.getLogger(__name__)

_SETTINGS = {
    # A path is small but what comes back for it is not; pixels set a smaller number of their own.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
    "spark.sql.session.timeZone": "UTC",
    # Rows of the ledger have more columns than Spark likes to print, of which it would warn.
    "spark.sql.debug.maxToStringFields": "100",
    # Barrier stages refuse to run with it, and an ingest should not lose its workers' caches.
    "spark.dynamicAllocation.enabled": "false",
    "spark.speculation": "false",
    "spark.ui.showConsoleProgress": "true",
    # Keys never are settings, but whatever looks like one is not to be readable in the event log.
    "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|hmac|pseudonym",
}
_PARTITIONS = "spark.sql.shuffle.partitions"


class SparkConfig(Config):
    """Where Spark runs. What spark-submit or the platform already decided is left as it is."""

    master: str | None = Field(
        None, description="Spark master; by default what spark-submit says, else every local core"
    )
    log_level: str = Field("WARN", description="log level of the JVM: ERROR, WARN, INFO, DEBUG")
    settings: dict[str, str] = Field(
        default_factory=dict, description="further Spark properties, by name"
    )


@contextmanager
def spark_session(config: SparkConfig, *, name: str = "medspark") -> Iterator[SparkSession]:
    """Yield a session in whose workers medspark can be imported.

    A session that runs already, as in a notebook, is used and left running; one that was
    started here is stopped at the end.
    """
    running = SparkSession.getActiveSession()
    spark = running or _start(config, name)
    spark.sparkContext.setLogLevel(config.log_level)
    if not is_local(spark):
        spark.sparkContext.addPyFile(str(package_file()))
    try:
        yield spark
    finally:
        if running is None:
            spark.stop()


@contextmanager
def task_errors() -> Iterator[None]:
    """Raise RunError, in one line that names the cause, for work that failed inside Spark."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        _LOGGER.debug("Spark gave up", exc_info=error)
        raise RunError(f"A Spark task failed: {_cause(str(error))}") from error


def _cause(text: str) -> str:
    """Return the last Python error in what Spark says, or else the first line of that."""
    found = re.findall(r"^((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    python = [(name, said) for name, said in found if not name.startswith(("java.", "org."))]
    if not python:
        return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    name, said = python[-1]
    return str(said) if name.endswith("RunError") else f"{name.rpartition('.')[2]}: {said}"


def is_local(spark: SparkSession) -> bool:
    """Return whether driver and workers share one machine and one Python installation."""
    return _runs_here(str(spark.sparkContext.master))


def _runs_here(master: str) -> bool:
    return master == "local" or master.startswith("local[")


def _start(config: SparkConfig, name: str) -> SparkSession:
    SparkContext._ensure_initialized()  # so that SparkConf sees what spark-submit was told
    submitted = SparkConf()
    master = config.master or submitted.get("spark.master", "local[*]") or "local[*]"
    if _runs_here(master):
        # Without it the workers run whatever python3 comes first on the path.
        os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.appName(name).master(_retrying(master))
    builder = builder.config("spark.log.level", config.log_level)
    for key, value in _SETTINGS.items():
        if not submitted.contains(key):
            builder = builder.config(key, value)
    for key, value in config.settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    if _runs_here(master) and not submitted.contains(_PARTITIONS):
        # 200 is made for a cluster: on a laptop it is a second of waiting at every shuffle.
        spark.conf.set(_PARTITIONS, str(2 * spark.sparkContext.defaultParallelism))
    return spark


def _retrying(master: str) -> str:
    """Return ``master`` so that a local task that dies is tried again, as on a cluster."""
    cores = re.fullmatch(r"local(?:\[([\d*]+)\])?", master)
    return f"local[{cores[1] or 1},4]" if cores else master
