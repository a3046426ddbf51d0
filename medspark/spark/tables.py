"""Read and write tables of Parquet files: by Spark, or in object stores by pyarrow in its tasks.

Spark needs a jar for each kind of object store (Hadoop's s3a connector), which its package does not
have. Tasks that read and write by ``medspark.storage`` need none, and use the same credentials as
everything else.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from medspark import storage
from medspark.spark.cluster import default_parallelism
from medspark.spark.task import from_arrow, map_batches

__all__ = ["read_files", "read_foreign", "staged", "write_files"]


def read_files(spark: SparkSession, files: Sequence[str], schema: StructType) -> DataFrame:
    """Return the rows of Parquet files, by URL, in the columns of ``schema``.

    A column that a file lacks is null.
    """
    if not files:  # Spark leaves out what it would do with an empty Arrow table
        return from_arrow(spark, to_arrow_schema(schema).empty_table())
    if not storage.is_object_store(files[0]):
        return spark.read.schema(schema).parquet(*map(storage.for_spark, files))
    tasks = min(len(files), 8 * default_parallelism(spark))
    named = from_arrow(spark, pa.table({"file": list(files)})).repartition(tasks)
    return map_batches(named, _ReadFiles(to_arrow_schema(schema)), schema)


def write_files(rows: DataFrame, folder: str) -> list[str] | None:
    """Write ``rows`` to Parquet files in ``folder``; return their URLs, in an object store.

    There a task that runs twice leaves a file more, which is not returned. Elsewhere Spark leaves
    nothing of such a task: all Parquet files of the folder are the table.
    """
    if not storage.is_object_store(folder):
        rows.write.parquet(storage.for_spark(folder))
        return None
    work = _WriteFiles(folder, to_arrow_schema(rows.schema))
    return sorted(row["file"] for row in map_batches(rows, work, "file string").collect())


def staged(rows: DataFrame, folder: str) -> DataFrame:
    """Write ``rows`` to ``folder`` and read them back, so that Spark computes them only once."""
    spark, schema = rows.sparkSession, rows.schema
    files = write_files(rows, folder)
    if files is None:
        return spark.read.schema(schema).parquet(storage.for_spark(folder))
    return read_files(spark, files, schema)


def read_foreign(spark: SparkSession, url: str) -> DataFrame:
    """Return a table that somebody else wrote: a Parquet file or folder, or a CSV with a header.

    The columns of a CSV are text.
    """
    is_parquet = url.endswith((".parquet", "/"))
    if not storage.is_object_store(url):
        place = storage.for_spark(url)
        return spark.read.parquet(place) if is_parquet else spark.read.csv(place, header=True)
    system, path = storage.filesystem(url)
    if is_parquet:
        files = [path] if system.isfile(path) else system.find(path)
        urls = [f"s3://{name}" for name in files if name.endswith(".parquet")]
        with system.open(storage.filesystem(urls[0])[1] if urls else path, "rb") as file:
            schema = from_arrow_schema(pq.read_schema(file))
        return read_files(spark, urls, schema)
    with system.open(path, "rb") as file, pa.csv.open_csv(file) as table:
        schema = pa.schema([(name, pa.string()) for name in table.schema.names])
    named = from_arrow(spark, pa.table({"file": [url]}))
    return map_batches(named, _ReadCsv(schema), from_arrow_schema(schema))


@dataclass(frozen=True)
class _ReadFiles:
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for url in batch["file"].to_pylist():
                system, path = storage.filesystem(url)
                table = ds.dataset(path, schema=self.schema, filesystem=system, format="parquet")
                yield from table.to_batches(batch_readahead=1, use_threads=False)


@dataclass(frozen=True)
class _ReadCsv:
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        types = pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in self.schema.names}
        )
        for batch in batches:
            for url in batch["file"].to_pylist():
                system, path = storage.filesystem(url)
                with system.open(path, "rb") as file:
                    yield from pa.csv.open_csv(file, convert_options=types)


@dataclass(frozen=True)
class _WriteFiles:
    folder: str
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        url = storage.join(self.folder, f"part-{uuid.uuid4().hex}.parquet")
        rows = (batch for batch in batches if batch.num_rows)
        first = next(rows, None)
        if first is None:
            return
        system, path = storage.filesystem(url)
        with system.open(path, "wb") as file, pq.ParquetWriter(file, self.schema) as writer:
            for batch in chain([first], rows):
                writer.write_table(pa.Table.from_batches([batch]).cast(self.schema))
        yield pa.RecordBatch.from_pydict({"file": [url]})
