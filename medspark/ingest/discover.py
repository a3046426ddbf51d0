"""List the files of an archive on many machines; no machine has to hold the whole list."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark import storage
from medspark.errors import UsageError
from medspark.spark.cluster import default_parallelism
from medspark.spark.tables import read_foreign
from medspark.spark.task import from_arrow, map_batches

SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("modified", pa.int64())])
_SPARK_SCHEMA = "path string, size bigint, modified bigint"

# The driver lists this many entries and holds them: a few megabytes, however large the archive is.
# Tasks list the remaining folders.
DRIVER_BUDGET = 10_000
_BATCH = 4096

Row = tuple[str, int, int]


def discover(
    spark: SparkSession,
    source: str,
    *,
    exclude: frozenset[str] = frozenset(),
    follow_links: bool = False,
    budget: int = DRIVER_BUDGET,
) -> DataFrame:
    """Return the files below ``source``: path relative to it, size in bytes, mtime in ns.

    A link that leads out of the source has the size OUTSIDE, unless ``follow_links``.

    The driver starts listing, breadth first. After ``budget`` entries, tasks walk the remaining
    folders. ``exclude`` names paths, relative to the source, to leave out.
    """
    source = storage.normalise(source)
    walk = Walk(source, follow_links)
    files, folders = walk.some(budget)
    listed = from_arrow(spark, pa.Table.from_batches([_batch(files)] if files else [], SCHEMA))
    if folders:
        tasks = spark.createDataFrame([(folder,) for folder in folders], "folder string")
        tasks = tasks.repartition(min(len(folders), 8 * default_parallelism(spark)))
        listed = listed.unionByName(map_batches(tasks, walk, _SPARK_SCHEMA))
    return listed.where(~F.col("path").isin(sorted(exclude))) if exclude else listed


def from_inventory(spark: SparkSession, inventory: str, source: str) -> DataFrame:
    """Return the files that an inventory table names, instead of listing ``source``.

    The table is CSV with a header, or Parquet. Its columns are path (absolute, or relative to
    ``source``), size and, optionally, modified (any number that changes with the file). Raises
    UsageError if path or size is missing.
    """
    table = read_foreign(spark, inventory)
    missing = {"path", "size"} - set(table.columns)
    if missing:
        raise UsageError(f"The inventory {inventory} has no column {sorted(missing)[0]!r}.")
    inside = storage.normalise(source) + "/"
    is_absolute = F.col("path").startswith(inside)
    modified = F.col("modified") if "modified" in table.columns else F.lit(0)
    return table.select(
        F.when(is_absolute, F.col("path").substr(F.lit(len(inside) + 1), F.length("path")))
        .otherwise(F.col("path"))
        .alias("path"),
        F.col("size").cast("bigint").alias("size"),
        F.coalesce(modified.cast("bigint"), F.lit(0)).alias("modified"),
    )


@dataclass(frozen=True)
class Walk:
    """Lists a source: on the driver up to a budget, or in a task the trees below given folders."""

    source: str
    follow_links: bool = False

    def some(self, budget: int) -> tuple[list[Row], list[str]]:
        """List breadth first up to ``budget`` entries; return files and the unlisted folders."""
        files: list[Row] = []
        folders = deque([self.source])
        seen = 0
        while folders and seen < budget:
            folder, entries = folders.popleft(), []
            for entry in self._children(folder):
                seen += 1
                if seen >= budget:
                    # Drop this folder's entries: a task lists the whole folder again.
                    return files, [*folders, folder]
                entries.append(entry)
            files += [_row(entry, self.source) for entry in entries if not entry.is_folder]
            folders.extend(entry.path for entry in entries if entry.is_folder)
        return files, list(folders)

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Take batches of folders and yield the files below them, as rows of SCHEMA."""
        rows: list[Row] = []
        for batch in batches:
            for folder in batch.column(0).to_pylist():
                for row in self.below(folder):
                    rows.append(row)
                    if len(rows) == _BATCH:
                        yield _batch(rows)
                        rows = []
        if rows:
            yield _batch(rows)

    def below(self, folder: str) -> Iterator[Row]:
        """Yield every file of the tree below ``folder``."""
        for entry in self._children(folder):
            if entry.is_folder:
                yield from self.below(entry.path)
            else:
                yield _row(entry, self.source)

    def _children(self, folder: str) -> Iterator[storage.Entry]:
        return storage.children(folder, inside=None if self.follow_links else self.source)


def _row(entry: storage.Entry, source: str) -> Row:
    return _printable(entry.path[len(source) + 1 :]), entry.size, entry.modified


def _printable(path: str) -> str:
    # Arrow cannot hold a name that is not UTF-8. The escaped name opens no file, so the file goes
    # into quarantine.
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = [list(column) for column in zip(*rows, strict=True)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
