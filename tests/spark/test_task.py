"""The state of Spark's Python workers between two tasks."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipimport import zipimporter

import pyarrow as pa
import pytest

from medspark.spark.task import for_each, map_batches


def look(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Report what costs time between tasks: importers of zips, and objects to collect."""
    for batch in batches:
        zips = sum(isinstance(found, zipimporter) for found in sys.path_importer_cache.values())
        states = [f"{zips} {gc.get_freeze_count() > 10_000}"] * batch.num_rows
        yield pa.RecordBatch.from_pydict({"state": states})


@pytest.mark.spark
def test_a_worker_neither_reads_zips_nor_collects_libraries_before_its_next_task(spark):
    for _ in range(2):
        rows = map_batches(spark.range(0, 8, 1, 8), look, "state string").collect()

    assert [row["state"] for row in rows].count("0 True") >= 6


def import_late(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Import a library that no worker has, and report how many objects are still collected."""
    for batch in batches:
        known = "late_library" in sys.modules
        collected = len(gc.get_objects())
        if not known:
            sys.modules["late_library"] = library = types.ModuleType("late_library")
            library.things = [[] for _ in range(50_000)]
        states = [f"{known and collected > 50_000}"] * batch.num_rows
        yield pa.RecordBatch.from_pydict({"state": states})


@pytest.mark.spark
def test_what_a_task_imports_late_is_not_collected_before_the_next_task(spark):
    map_batches(spark.range(0, 8, 1, 8), look, "state string").collect()

    for _ in range(2):
        rows = map_batches(spark.range(0, 8, 1, 8), import_late, "state string").collect()

    assert {row["state"] for row in rows} == {"False"}


@pytest.mark.spark
def test_each_number_is_worked_on_in_a_task_of_its_own(spark, tmp_path: Path):
    def work(number: int) -> None:
        from pyspark import TaskContext

        (tmp_path / f"{number}-{TaskContext.get().partitionId()}").touch()

    for_each(spark, [7, 3, 11], work)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["11-2", "3-1", "7-0"]
