"""A Spark session, and something small for ranks to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from medspark.ingest.session import SparkConfig, spark_session
from medspark.launch.distributor import SPARK_SETTINGS, LaunchConfig, Launched, Task, run_ddp

Run = Callable[..., tuple[dict[str, Any], Launched]]


@pytest.fixture(scope="session", autouse=True)
def _tasks_can_be_imported() -> Iterator[None]:
    """Let ranks import rank_tasks.py: only medspark itself travels with the job."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def spark(_tasks_can_be_imported: None) -> Iterator[SparkSession]:
    """Two local slots."""
    with spark_session(SparkConfig(master="local[2]", settings=SPARK_SETTINGS)) as session:
        yield session


@pytest.fixture
def run(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that lets two ranks add up numbers, with the trouble it is given."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from rank_tasks import TinyConfig

    def start(
        *, launch: LaunchConfig | None = None, **tiny: Any
    ) -> tuple[dict[str, Any], Launched]:
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        task = Task(
            function="rank_tasks:add_up",
            config=TinyConfig(checkpoints=checkpoints, **tiny),
            run_dir=tmp_path,
            journal=tmp_path / "journal",
            checkpoints=checkpoints,
        )
        return run_ddp(task, spark=spark, launch=launch or LaunchConfig(processes=2))

    return start
