"""The state of Spark's Python workers between two tasks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from zipimport import zipimporter

import pyarrow as pa
import pytest

from medspark.spark.task import map_batches


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
