"""Room for the ranks, as far as it is known before Spark starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medspark.errors import UsageError
from medspark.launch.distributor import LaunchConfig, check_room
from medspark.launch.slots import (
    Slots,
    available_cores,
    check_settings,
    local_slots,
    usual_ranks,
)


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
    with pytest.raises(UsageError, match=r"launch\.ddp false is for one process"):
        check_room(LaunchConfig(ddp=False, processes=processes), "local[2]")

    check_room(LaunchConfig(ddp=False, processes=1), "local[2]")


@pytest.mark.spark
def test_the_master_of_spark_submit_is_known_before_there_is_a_session(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "from medspark.launch.slots import submitted_master\nprint(submitted_master(None))\n"
    )
    submit = str(Path(sys.executable).with_name("spark-submit"))
    root = Path(__file__).parents[2]

    said = subprocess.run(
        [submit, "--master", "spark://nowhere:7077", str(script)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(root), "PYSPARK_PYTHON": sys.executable},
    ).stdout  # fmt: skip

    assert said.split() == ["spark://nowhere:7077"]


ALLOWED = {"pytorch.spark.distributor.ignoreSsl": "true"}
GPU = {"spark.task.resource.gpu.amount": "1"}


def _session(settings: dict[str, str]) -> Any:
    """Return what check_settings needs of a session."""
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
