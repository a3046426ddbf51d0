"""Get or start the Spark session of a job, with medspark importable in its workers."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pydantic import Field
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from medspark.config import Config
from medspark.errors import RunError, UsageError
from medspark.spark.cluster import (
    default_parallelism,
    is_connect,
    is_local,
    running_session,
    runs_here,
)
from medspark.spark.ship import package_file

_LOGGER = logging.getLogger(__name__)

_SETTINGS = {
    # Rows of paths are small, but their results are not. Stages that move pixels set fewer rows.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
    "spark.sql.session.timeZone": "UTC",
    # Ledger rows have more columns than Spark prints by default; beyond that it would warn.
    "spark.sql.debug.maxToStringFields": "100",
    # Barrier stages cannot run with it, and an ingest would lose its workers' caches.
    "spark.dynamicAllocation.enabled": "false",
    "spark.speculation": "false",
    "spark.ui.showConsoleProgress": "true",
    # medspark stores no key in a setting. Hide settings of users that look like one in event logs.
    "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|hmac|pseudonym",
}
_PARTITIONS = "spark.sql.shuffle.partitions"
# If driver and workers share a machine, no other machine may connect to them.
_LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
_UI = "spark.ui.enabled"
_AUTHENTICATE = "spark.authenticate"
_REMOTE = "SPARK_REMOTE"
_CONNECT_ADDRESS = "spark.connect.grpc.binding.address"


class SparkConfig(Config):
    """Where Spark runs. medspark's defaults never override spark-submit's or the platform's."""

    master: str | None = Field(
        None,
        description="Spark master; by default spark-submit's, else all local cores. Spark's "
        "variable SPARK_REMOTE comes before it: local[2] or sc://HOST:PORT, through Spark Connect",
    )
    log_level: str = Field("WARN", description="log level of the JVM: ERROR, WARN, INFO, DEBUG")
    settings: dict[str, str] = Field(
        default_factory=dict, description="further Spark properties, by name"
    )
    encrypted: bool = Field(
        False,
        description="refuse a session that does not authenticate, and encrypt traffic and local "
        "files (conf/profiles/secure.yaml has the settings)",
    )


@contextmanager
def spark_session(config: SparkConfig, *, name: str = "medspark") -> Iterator[SparkSession]:
    """Yield a session whose workers can import medspark.

    A running session, as in a notebook, is used and left running. A session that this function
    starts is stopped at the end. Raises UsageError if the session is not encrypted although
    ``config`` requires it.
    """
    # A thread that is new to the JVM has no active session, although its process has one.
    alone = SparkContext._active_spark_context is None
    running = running_session()
    remote = os.environ.get(_REMOTE)
    spark = running or _start(config, name, remote)
    try:
        if config.encrypted:
            _check_encrypted(spark)
        if not is_connect(spark):
            spark.sparkContext.setLogLevel(config.log_level)
        if not is_local(spark):
            _ship(spark)
        yield spark
    finally:
        if running is None and alone:
            spark.stop()
            if remote:
                os.environ[_REMOTE] = remote  # a Connect session forgets it when it stops


@contextmanager
def task_errors() -> Iterator[None]:
    """Turn errors of Spark into a RunError of one line that names the cause."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        _LOGGER.debug("a Spark job failed", exc_info=error)
        raise RunError(f"A Spark task failed: {_cause(str(error))}") from error


def _cause(text: str) -> str:
    """Return the last Python error in Spark's message, or else the message's first line."""
    errors = re.findall(r"^((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    python = [(name, message) for name, message in errors if not name.startswith(("java.", "org."))]
    if not python:
        if "Python worker exited unexpectedly" in text:
            return "a Python worker ended unexpectedly; it may have run out of memory."
        return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    name, message = python[-1]
    return (
        str(message)
        if name.endswith(("RunError", "UsageError"))
        else f"{name.rpartition('.')[2]}: {message}"
    )


def _ship(spark: SparkSession) -> None:
    """Let the workers import medspark."""
    if is_connect(spark):
        spark.addArtifacts(str(package_file()), pyfile=True)
    else:
        spark.sparkContext.addPyFile(str(package_file()))


def _start(config: SparkConfig, name: str, remote: str | None) -> SparkSession:
    if remote:
        _check_connect()
    if remote and not runs_here(remote):
        return _connected(config, name)
    with _without_remote():
        SparkContext._ensure_initialized()  # so that SparkConf sees spark-submit's arguments
        submitted = SparkConf()
    master = remote or config.master or submitted.get("spark.master", "local[*]") or "local[*]"
    if runs_here(master):
        # Without it the workers run the first python3 on the path.
        os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.appName(name).config("spark.log.level", config.log_level)
    for key, value in _chosen(config.settings, master, submitted.get).items():
        builder = builder.config(key, value)
    if not remote:
        spark = builder.master(_retrying(master)).getOrCreate()
    else:
        if not submitted.contains(_CONNECT_ADDRESS) and _CONNECT_ADDRESS not in config.settings:
            builder = builder.config(_CONNECT_ADDRESS, "127.0.0.1")
        spark = _own_server(builder.remote(_retrying(remote)))
    if runs_here(master) and not submitted.contains(_PARTITIONS):
        # Spark's default of 200 suits clusters. On a laptop it costs a second per shuffle.
        spark.conf.set(_PARTITIONS, str(2 * default_parallelism(spark)))
    return spark


@contextmanager
def _without_remote() -> Iterator[None]:
    """Hide SPARK_REMOTE, with which Spark's launcher would start no JVM."""
    remote = os.environ.pop(_REMOTE, None)
    try:
        yield
    finally:
        if remote is not None:
            os.environ[_REMOTE] = remote


def _own_server(builder: SparkSession.Builder) -> SparkSession:
    """Start a Connect server in this process's JVM, on a free port; return a session of it.

    PySpark makes a token for each such server, so that no other user of the machine can use it.
    """
    with warnings.catch_warnings():
        # Spark gives the session the server's own settings too, and warns of each.
        warnings.filterwarnings("ignore", "Failed to set spark", UserWarning)
        # PySpark takes a free port with this variable only; without, a second job would meet the
        # first one's server. The JVM runs already and does not see it.
        os.environ["SPARK_TESTING"] = "1"
        try:
            return builder.getOrCreate()
        finally:
            del os.environ["SPARK_TESTING"]


def _connected(config: SparkConfig, name: str) -> SparkSession:
    """Return a session of the server that SPARK_REMOTE names, with what a session can set.

    Spark warns of those of ``config.settings`` that only a server can set when it starts.
    """
    builder = SparkSession.builder.appName(name)
    own = {key: value for key, value in _SETTINGS.items() if key.startswith("spark.sql.")}
    for key, value in (own | config.settings).items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def _check_connect() -> None:
    """Raise UsageError if Spark Connect's libraries are missing."""
    try:
        importlib.import_module("pyspark.sql.connect.session")
    except ImportError as error:
        raise UsageError(
            f"{_REMOTE} asks for Spark Connect, whose libraries are missing: pip install "
            "'medspark[connect]'."
        ) from error


def _chosen(
    settings: Mapping[str, str],
    master: str,
    submitted: Callable[[str], str | None],
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the session's settings: medspark's defaults unless ``submitted``, and ``settings``.

    Raises UsageError if a standalone cluster authenticates and the secret is missing.
    """
    defaults = _SETTINGS | (_LOOPBACK | {_UI: "false"} if runs_here(master) else {})
    chosen = {key: value for key, value in defaults.items() if submitted(key) is None}
    chosen |= settings

    def is_on(key: str) -> bool:
        return str(chosen.get(key, submitted(key))).lower() == "true"

    if runs_here(master) and is_on(_UI) and not _is_loopback(environment.get("SPARK_LOCAL_IP")):
        _LOGGER.warning(
            "Spark's UI stays off, because it would listen on all interfaces: to use it, set "
            "SPARK_LOCAL_IP=127.0.0.1 in the environment."
        )
        chosen[_UI] = "false"
    secret = chosen.get(f"{_AUTHENTICATE}.secret", submitted(f"{_AUTHENTICATE}.secret"))
    if master.startswith("spark://") and is_on(_AUTHENTICATE) and not secret:
        raise UsageError(
            f"{_AUTHENTICATE} is on, so the driver needs the secret of the master and workers of "
            f"{master}: put {_AUTHENTICATE}.secret into a file that only you can read, and pass "
            "it to spark-submit with --properties-file."
        )
    return chosen


def _is_loopback(address: str | None) -> bool:
    try:
        return address == "localhost" or ip_address(address or "").is_loopback
    except ValueError:
        return False


def _check_encrypted(spark: SparkSession) -> None:
    """Raise UsageError unless the session authenticates and encrypts traffic and local files.

    The check reads the settings that the context was started with: those that a profile gives
    later are not in force. Spark's security manager cannot be asked in Spark 4.3: py4j then looks
    for a class of protobuf's that its package lacks.
    """
    if is_connect(spark):
        raise UsageError(
            "A Spark Connect session does not tell whether its cluster encrypts its traffic, so "
            "spark.encrypted needs a classic session."
        )
    started = spark.sparkContext.getConf()
    names = (_AUTHENTICATE, "spark.network.crypto.enabled", "spark.io.encryption.enabled")
    if missing := [name for name in names if (started.get(name) or "").lower() != "true"]:
        raise UsageError(
            f"This Spark session has to be encrypted, but it was started without "
            f"{' and '.join(missing)}: set them when the session starts, for your own cluster with "
            "spark-submit --properties-file."
        )


def _retrying(master: str) -> str:
    """Return ``master`` with four attempts per task if it is local, as on a cluster."""
    cores = re.fullmatch(r"local(?:\[([\d*]+)\])?", master)
    return f"local[{cores[1] or 1},4]" if cores else master
