"""The report of make scale: goals against the smallest size, and a record that claims can hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
from measure import look_up
from memory_watch import DRIVER, DRIVER_JVM, EXECUTOR_JVM, WORKER, _role
from records import Record
from scale_report import COLUMNS, goals, record_of, table


def size(files: int, **figures: float | None) -> dict[str, Any]:
    return {"files": files, **dict.fromkeys(COLUMNS, 1.0), "again_share": 0.04} | figures


@pytest.mark.parametrize(
    ("name", "value", "reached"),
    [
        ("ingest_per_second", 0.91, True), ("ingest_per_second", 0.89, False),
        ("driver_mb", 1.09, True), ("driver_mb", 1.11, False),
        ("again_share", 0.05, True), ("again_share", 0.06, False),
        ("open_seconds", 2.0, True), ("open_seconds", 2.1, False),
    ],
)  # fmt: skip
def test_a_goal_is_held_at_the_largest_size(name, value, reached):
    rows = goals([size(10), size(100), size(1_000_000, **{name: value})])

    assert all(row["reached"] for row in rows) is reached


def test_one_size_alone_has_no_growth():
    assert [row["name"] for row in goals([size(10)])] == ["open_seconds"]
    assert [row["name"] for row in goals([size(1_000_000)])] == ["again", "open_seconds"]


def test_a_record_of_the_result_renders_and_finds_its_figures_again():
    sizes = [size(10_000, driver_mb=200.0), size(100_000, train_per_second=None)]
    result = {"cores": 2, "sizes": sizes, "rows": goals(sizes)}

    record = Record.model_validate(record_of(result))

    for figure in record.figures.values():
        assert look_up(result, figure.path) == figure.value
    assert re.search(r"\| 10,000 \| 1 .* 200 ", record.render())


def test_the_table_has_a_line_for_each_size_and_goal():
    sizes = [size(10), size(100_000)]

    assert len(table({"sizes": sizes, "rows": goals(sizes)})) == 2 + 2 + 4


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("/usr/bin/java -cp x org.apache.spark.deploy.SparkSubmit", DRIVER_JVM),
        ("java org.apache.spark.executor.CoarseGrainedExecutorBackend --x", EXECUTOR_JVM),
        ("/venv/bin/python /home/me/jobs/ingest.py --source jobs/x", DRIVER),
        ("python3 jobs/shard.py", DRIVER),
        ("python3.11 -m pyspark.daemon", WORKER),
        ("bash spark-submit jobs/ingest.py", None),
    ],
)
def test_a_process_has_its_role_in_a_job(line, role):
    assert _role(line.split()) == role
