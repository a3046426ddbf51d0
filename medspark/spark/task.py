"""Give Arrow tables to Spark, and run functions of Arrow batches in its Python workers.

Workers are reused from task to task.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from zipimport import zipimporter

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from medspark.spark.cluster import default_parallelism

Batches = Iterable[pa.RecordBatch]

_FILES_PER_TASK = 1000
# A task makes a part, and the driver holds a record of each.
_MOST_TASKS = 10_000

_modules_frozen = 0  # how many modules this process had when its objects were exempted


def map_batches(
    rows: DataFrame, work: Callable[[Batches], Iterator[pa.RecordBatch]], schema: StructType | str
) -> DataFrame:
    """Apply ``work`` to the batches of each partition, as ``DataFrame.mapInArrow`` does.

    Afterwards the worker is prepared for its next task, which would else start half a second late.
    """
    return rows.mapInArrow(_Task(work), schema)


def tasks_for(spark: SparkSession, files: int, *, per_core: int = 4) -> int:
    """Return into how many tasks to spread ``files``: one or more.

    There are several tasks per core, so that a task with slow files does not delay the rest.
    """
    cores = default_parallelism(spark)
    enough = min(math.ceil(files / _FILES_PER_TASK), _MOST_TASKS)
    return max(1, min(files, max(per_core * cores, enough)))


def from_arrow(spark: SparkSession, table: pa.Table) -> DataFrame:
    """Return ``table`` as a DataFrame. Connect needs the schema of one without rows."""
    return spark.createDataFrame(table, from_arrow_schema(table.schema))


def for_each(spark: SparkSession, numbers: Sequence[int], work: Callable[[int], object]) -> None:
    """Call ``work`` with each of ``numbers`` in a task of its own; return when all are done."""
    rows = spark.range(0, len(numbers), numPartitions=len(numbers))
    map_batches(rows, _Each(tuple(numbers), work), "done boolean").collect()


@dataclass(frozen=True)
class _Each:
    numbers: tuple[int, ...]
    work: Callable[[int], object]

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch["id"].to_pylist():
                self.work(self.numbers[row])
        yield pa.RecordBatch.from_pylist([], pa.schema([("done", pa.bool_())]))


@dataclass(frozen=True)
class _Task:
    work: Callable[[Batches], Iterator[pa.RecordBatch]]

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        yield from self.work(batches)
        _forget_zips()
        _freeze()


def _forget_zips() -> None:
    """Forget the importers of zip files. Python makes them again from cached directories.

    Before each task PySpark makes all importers read their directories again. Before Python 3.13,
    reading pyspark.zip's takes a quarter of a second.
    """
    for path, importer in list(sys.path_importer_cache.items()):
        if isinstance(importer, zipimporter):
            del sys.path_importer_cache[path]


def _freeze() -> None:
    """Exempt all current objects, mostly of libraries, from garbage collection.

    PySpark collects garbage after each task, and would visit all objects of all libraries: with
    torch, that takes an eighth of a second. What a task imports late is exempted after it.
    """
    global _modules_frozen
    if len(sys.modules) != _modules_frozen:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()
