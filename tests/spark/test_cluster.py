"""A cluster's facts are found out for classic sessions and for Connect sessions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.errors import PySparkException

from medspark.spark import cluster
from medspark.spark.cluster import (
    default_parallelism,
    executor_slots,
    is_connect,
    is_local,
    master_of,
    setting,
)
from medspark.spark.slots import Slots, slots_of, submitted_master


class Connected:
    """A Connect session: properties and queries, no SparkContext, and ``silent`` properties."""

    __module__ = "pyspark.sql.connect.session"

    def __init__(self, *, cores: int = 2, silent: bool = False, **settings: str) -> None:
        self.conf = self
        self.silent = silent
        self.settings = {name.replace("_", "."): value for name, value in settings.items()}
        self.cores = cores
        self.range = self.select = lambda *_: self
        self.distinct = lambda: SimpleNamespace(count=lambda: self.cores)

    def get(self, key: str, default: str) -> str:
        if self.silent:
            raise PySparkException(f"{key} is not available")
        return self.settings.get(key, default)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Connect server in this process, and functions that need no session."""
    monkeypatch.delenv("SPARK_LOCAL_REMOTE", raising=False)
    monkeypatch.setattr(
        cluster, "F", SimpleNamespace(spark_partition_id=lambda: SimpleNamespace(alias=str))
    )


def test_a_classic_session_is_none_of_connect() -> None:
    classic: Any = SimpleNamespace(sparkContext=SimpleNamespace(master="local[3]"))

    assert not is_connect(classic)
    assert is_local(classic)
    assert master_of(classic) == "local[3]"


def test_a_server_with_a_local_master_is_here_only_if_this_process_runs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spark: Any = Connected(cores=7, spark_master="local[5,4]")

    assert is_connect(spark)
    assert not is_local(spark)
    assert default_parallelism(spark) == 7
    monkeypatch.setenv("SPARK_LOCAL_REMOTE", "1")
    assert is_local(spark)
    assert default_parallelism(spark) == 5
    assert slots_of(spark) == Slots(5, 1, 5)


@given(cores=st.integers(2, 64), each=st.integers(1, 64), cpus=st.integers(1, 4))
def test_a_servers_executors_have_the_cores_that_its_queries_show(
    cores: int, each: int, cpus: int
) -> None:
    spark: Any = Connected(
        cores=cores,
        spark_master="spark://host:7077",
        spark_executor_cores=str(each),
        spark_task_cpus=str(cpus),
    )

    found = executor_slots(spark)

    assert found
    assert cores - each < sum(own for _, own in found) <= cores
    assert all(own <= each and tasks * cpus <= own for tasks, own in found)
    assert slots_of(spark).tasks == sum(tasks for tasks, _ in found)


def test_a_property_that_a_server_does_not_tell_has_its_default() -> None:
    spark: Any = Connected(silent=True)

    assert setting(spark, "spark.task.cpus", "3") == "3"
    assert not is_local(spark)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("remote", ["local[2]", "sc://host:15002"])
def test_sparks_variable_for_connect_comes_before_the_configured_master(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_REMOTE", remote)

    assert submitted_master("local[7]") == remote
