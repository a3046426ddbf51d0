"""The Databricks bundle: it names what is there, in an order in which it can run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from medspark.config import dotted_keys
from medspark.job import JobConfig

CONF = Path(__file__).parents[1] / "conf"
BUNDLE: dict[str, Any] = yaml.safe_load((CONF / "databricks.yml").read_text())
JOBS: dict[str, Any] = BUNDLE["resources"]["jobs"]
TASKS = [(job, task) for job, settings in JOBS.items() for task in settings["tasks"]]
tasks = pytest.mark.parametrize(
    "task", [t for _, t in TASKS], ids=[t["task_key"] for _, t in TASKS]
)


def _config_of(job: ModuleType) -> type[JobConfig]:
    (found,) = [
        value
        for value in vars(job).values()
        if isinstance(value, type)
        and issubclass(value, JobConfig)
        and value.__module__ == job.__name__
    ]
    return found


def _parameters(task: dict[str, Any]) -> dict[str, str]:
    pairs = [p.removeprefix("--").split("=", 1) for p in task["spark_python_task"]["parameters"]]
    return dict(pairs)


@tasks
def test_a_task_runs_a_job_that_is_there_with_keys_that_it_has(
    task: dict[str, Any], load_job: Callable[[str], ModuleType]
) -> None:
    job = (CONF / task["spark_python_task"]["python_file"]).resolve()

    assert job.parent == CONF.parent / "jobs"
    known = [*dotted_keys(_config_of(load_job(job.stem))), "config", "profile"]
    assert set(_parameters(task)) <= set(known)


@tasks
def test_the_configurations_that_a_task_names_are_there(task: dict[str, Any]) -> None:
    named = [_parameters(task).get(key, "") for key in ("config", "profile")]

    for path in filter(None, named):
        assert path.startswith("${workspace.file_path}/conf/")
        assert (CONF.parent / path.removeprefix("${workspace.file_path}/")).is_file(), path


def test_what_a_task_reads_was_written_by_one_that_it_waits_for() -> None:
    chain = {task["task_key"]: task for task in JOBS["medspark"]["tasks"]}
    waits = {
        name: [other["task_key"] for other in task.get("depends_on", [])]
        for name, task in chain.items()
    }
    reads = {name: _parameters(task) for name, task in chain.items()}

    assert waits == {"ingest": [], "shard": ["ingest"], "train": ["shard"], "evaluate": ["train"]}
    assert reads["shard"]["samples"] == reads["ingest"]["samples"]
    assert reads["train"]["shards"] == reads["evaluate"]["shards"] == reads["shard"]["shards"]
    assert reads["evaluate"]["model"] == reads["train"]["run_dir"] + "/model"


@pytest.mark.parametrize("job", JOBS)
def test_the_cluster_lets_ranks_start_together_one_for_each_gpu(job: str) -> None:
    (cluster,) = JOBS[job]["job_clusters"]

    settings = cluster["new_cluster"]["spark_conf"]
    assert settings["spark.dynamicAllocation.enabled"] == "false"
    assert settings["spark.task.resource.gpu.amount"] == "1"
    assert "autoscale" not in cluster["new_cluster"]
    assert all(t["job_cluster_key"] == cluster["job_cluster_key"] for t in JOBS[job]["tasks"])


def test_everything_that_is_written_lies_on_a_volume_and_models_have_three_levels() -> None:
    written = [v for _, t in TASKS for k, v in _parameters(t).items() if k in ("output", "run_dir")]

    assert BUNDLE["variables"]["work"]["default"].startswith("/Volumes/${var.catalog}/")
    assert all(path.startswith("${var.work}/") for path in written)
    (train,) = [t for _, t in TASKS if t["task_key"] == "train"]
    assert _parameters(train)["track.register_as"].count(".") == 4  # two of them inside ${var.…}


def test_the_key_of_the_pseudonyms_outlives_the_cluster_and_has_no_default() -> None:
    (ingest,) = [t for _, t in TASKS if t["task_key"] == "ingest"]

    assert _parameters(ingest)["privacy.key_file"] == "${var.key_file}"
    assert "default" not in BUNDLE["variables"]["key_file"]


def test_every_variable_that_is_used_is_declared_and_there_are_two_targets() -> None:
    used = set(re.findall(r"\$\{var\.(\w+)\}", (CONF / "databricks.yml").read_text()))

    assert used == set(BUNDLE["variables"])
    assert {name: t["mode"] for name, t in BUNDLE["targets"].items()} == {
        "dev": "development",
        "prod": "production",
    }
    assert BUNDLE["artifacts"]["medspark"]["type"] == "whl"
