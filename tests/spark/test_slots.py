"""Slots for the ranks, as known before the ranks start."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.launch.distributor import LaunchConfig, check_room
from medspark.spark import slots
from medspark.spark.cluster import available_cores, local_slots
from medspark.spark.slots import (
    Slots,
    check_settings,
    slots_of,
    usual_ranks,
    wait_for,
)

Worker = tuple[str, int, int]  # id, tasks at once, cores


class Spark:
    """The parts of a session that slots depend on: master, settings, workers of a cluster."""

    def __init__(self, master: str, *workers: Worker, **settings: str) -> None:
        self.sparkContext = self
        self.master = master
        self.conf = {name.replace("_", "."): value for name, value in settings.items()}
        self.workers = list(workers)
        self._jsc = self

    def sc(self) -> Spark:
        return self

    statusStore = sc  # noqa: N815 - the JVM's name

    def executorList(self, active: bool) -> Spark:  # noqa: N802 - the JVM's name
        assert active
        return self

    def size(self) -> int:
        return len(self.workers)

    def apply(self, index: int) -> SimpleNamespace:
        name, tasks, cores = self.workers[index]
        return SimpleNamespace(id=lambda: name, maxTasks=lambda: tasks, totalCores=lambda: cores)


@given(cores=st.integers(1, 64), cpus=st.integers(1, 8))
def test_a_task_of_several_cores_takes_as_many_of_a_local_master(cores: int, cpus: int) -> None:
    spark: Any = Spark(f"local[{cores}]", spark_task_cpus=str(cpus))

    assert slots_of(spark) == slots_of(spark, on_executors=False) == Slots(cores // cpus, 1, cores)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=5))
def test_a_cluster_has_the_room_of_its_executors_without_the_driver(
    workers: list[tuple[int, int]],
) -> None:
    found = [(str(number), *each) for number, each in enumerate(workers)]
    spark: Any = Spark("spark://host:7077", ("driver", 7, 7), *found, spark_task_cpus="2")

    assert slots_of(spark) == Slots(
        sum(tasks for tasks, _ in workers), len(workers), sum(cores for _, cores in workers)
    )


def test_ranks_on_the_driver_of_a_cluster_have_all_its_cores() -> None:
    spark: Any = Spark("spark://host:7077", ("1", 4, 4), spark_task_cpus="2")
    cores = available_cores()

    assert slots_of(spark, on_executors=False) == Slots(cores, 1, cores)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, which only waiting advances."""
    now = [0.0]
    monkeypatch.setattr(slots.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(slots.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


def test_a_cluster_that_grows_is_waited_for_until_there_is_room(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(*_: object, **__: object) -> Slots:
        return Slots(int(clock[0]), 1, 8)

    monkeypatch.setattr(slots, "slots_of", grown)
    spark: Any = Spark("spark://host:7077")

    assert wait_for(spark, 3, on_executors=True, seconds=30).tasks == 3
    assert clock[0] == 3
    assert wait_for(spark, 99, on_executors=True, seconds=5).tasks < 99
    assert 8 < clock[0] <= 9


@pytest.mark.parametrize(("master", "on_executors"), [("local[2]", True), ("yarn", False)])
def test_a_machine_that_does_not_grow_is_not_waited_for(
    clock: list[float], master: str, on_executors: bool
) -> None:
    spark: Any = Spark(master)

    wait_for(spark, 10**6, on_executors=on_executors, seconds=30)

    assert clock[0] == 0


@pytest.mark.parametrize(
    ("settings", "gpu", "sentence"),
    [
        ({}, False, None),
        ({"spark_dynamicAllocation_enabled": "true"}, False, "dynamic allocation"),
        ({"spark_ssl_enabled": "TRUE"}, False, "ranks exchange gradients unencrypted"),
        (
            {"spark_ssl_enabled": "true", "pytorch_spark_distributor_ignoreSsl": "true"},
            False,
            None,
        ),
        ({}, True, r"resource\.gpu\.amount=1 \(it is 0\)"),
        ({"spark_task_resource_gpu_amount": "1"}, True, None),
        ({"spark_task_resource_gpu_amount": "2"}, True, r"it is 2"),
        ({"spark_task_resource_gpu_amount": "2"}, False, None),
    ],
)
def test_settings_under_which_ranks_cannot_run_are_refused(
    settings: dict[str, str], gpu: bool, sentence: str | None
) -> None:
    spark: Any = Spark("spark://host:7077", **settings)

    with pytest.raises(UsageError, match=sentence) if sentence else nullcontext():
        check_settings(spark, gpu=gpu)


@pytest.mark.parametrize(
    ("master", "slots"),
    [
        ("local", 1),
        ("local[3]", 3),
        ("local[3,4]", 3),
        ("local[*]", available_cores()),
        ("local[*,2]", available_cores()),
        ("local-cluster[2,1,1024]", None),
        ("spark://host:7077", None),
        ("yarn", None),
    ],
)
def test_the_slots_of_a_master(master: str, slots: int | None) -> None:
    assert local_slots(master) == slots


@pytest.mark.parametrize(
    ("slots", "gpus", "ranks"), [(0, 0, 1), (1, 0, 1), (8, 0, 2), (8, 1, 1), (8, 2, 2), (1, 4, 1)]
)
def test_two_ranks_start_where_both_have_a_slot_and_a_gpu(slots: int, gpus: int, ranks: int):
    assert usual_ranks(Slots(slots, 1, slots), gpus=gpus) == ranks


@pytest.mark.usefixtures("no_session")
def test_more_processes_than_slots_are_refused_before_spark_starts() -> None:
    with pytest.raises(UsageError, match=r"processes is 3, but .* local\[2\] has 2 slots"):
        check_room(LaunchConfig(processes=3), "local[2]")


@pytest.mark.usefixtures("no_session")
def test_a_clusters_room_is_not_guessed() -> None:
    check_room(LaunchConfig(processes=300), "spark://host:7077")


@pytest.mark.usefixtures("no_session")
def test_ranks_on_the_driver_of_a_cluster_are_held_against_its_own_cores() -> None:
    cores = available_cores()
    check_room(LaunchConfig(processes=cores, where="driver"), "spark://host:7077")

    with pytest.raises(UsageError, match=rf"the driver has {cores} slot"):
        check_room(LaunchConfig(processes=cores + 1, where="driver"), "spark://host:7077")


@pytest.mark.parametrize("processes", [0, 2])
def test_only_a_single_process_can_do_without_ddp(processes: int) -> None:
    with pytest.raises(UsageError, match=r"launch\.ddp false needs one process"):
        check_room(LaunchConfig(ddp=False, processes=processes), "local[2]")

    check_room(LaunchConfig(ddp=False, processes=1), "local[2]")


@pytest.mark.spark
def test_the_master_of_spark_submit_is_known_before_there_is_a_session(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "from medspark.spark.slots import submitted_master\nprint(submitted_master(None))\n"
    )
    submit = str(Path(sys.executable).with_name("spark-submit"))
    root = Path(__file__).parents[2]

    said = subprocess.run(
        [submit, "--master", "spark://nowhere:7077", str(script)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(root), "PYSPARK_PYTHON": sys.executable},
    ).stdout  # fmt: skip

    # Spark sends what Python warns of the same way, and before it.
    assert said.split()[-1:] == ["spark://nowhere:7077"]


ALLOWED = {"pytorch.spark.distributor.ignoreSsl": "true"}
GPU = {"spark.task.resource.gpu.amount": "1"}


def _session(settings: dict[str, str]) -> Any:
    """Return the part of a session that check_settings needs."""
    return SimpleNamespace(conf=SimpleNamespace(get=settings.get))


@pytest.mark.parametrize("key", ["spark.ssl.enabled", "spark.network.crypto.enabled"])
def test_gradients_travel_in_clear_on_an_encrypted_cluster_only_if_that_is_allowed(
    key: str,
) -> None:
    with pytest.raises(UsageError, match=r"--spark\.settings\.pytorch\.spark\.\S+ true if"):
        check_settings(_session({key: "true"}), gpu=False)

    check_settings(_session({key: "true"} | ALLOWED), gpu=False)
    check_settings(_session({key: "false"}), gpu=False)


def test_ranks_do_without_dynamic_allocation_and_take_one_gpu_each() -> None:
    with pytest.raises(UsageError, match=r"spark\.dynamicAllocation\.enabled=false"):
        check_settings(_session({"spark.dynamicAllocation.enabled": "true"}), gpu=False)
    with pytest.raises(UsageError, match=r"gpu\.amount=1 \(it is 2\)"):
        check_settings(_session({"spark.task.resource.gpu.amount": "2"}), gpu=True)

    check_settings(_session(GPU), gpu=True)
    check_settings(_session({"spark.task.resource.gpu.amount": "2"}), gpu=False)
