"""A small task for ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from medspark.launch.distributor import LaunchConfig, Launched, Task, run_ddp

Run = Callable[..., tuple[dict[str, Any], Launched]]


@pytest.fixture
def run(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that lets two ranks add up numbers, with a given fault."""
    # Spark ships only medspark, so the ranks find these tasks through PYTHONPATH.
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", here)
    monkeypatch.setitem(spark.sparkContext.environment, "PYTHONPATH", here)
    from rank_tasks import TinyConfig

    def start(
        *,
        launch: LaunchConfig | None = None,
        most_ranks: Callable[[int], int] = int,
        **tiny: Any,
    ) -> tuple[dict[str, Any], Launched]:
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        task = Task(
            function="rank_tasks:add_up",
            config=TinyConfig(checkpoints=checkpoints, **tiny),
            run_dir=tmp_path,
            journal=tmp_path / "journal",
            checkpoints=checkpoints,
            most_ranks=most_ranks,
        )
        return run_ddp(task, spark=spark, launch=launch or LaunchConfig(processes=2))

    return start
