"""Work on Arrow batches in Spark's Python workers, which serve one task after the other."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from zipimport import zipimporter

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import StructType

Batches = Iterable[pa.RecordBatch]


def map_batches(
    rows: DataFrame, work: Callable[[Batches], Iterator[pa.RecordBatch]], schema: StructType | str
) -> DataFrame:
    """Return what ``work`` makes of the batches of each partition, as ``DataFrame.mapInArrow``.

    It leaves the worker so that the next task starts at once; without that it takes half a second.
    """
    return rows.mapInArrow(_Task(work), schema)


@dataclass(frozen=True)
class _Task:
    work: Callable[[Batches], Iterator[pa.RecordBatch]]

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        yield from self.work(batches)
        _forget_zips()
        _freeze()


def _forget_zips() -> None:
    """Forget the importers of zip files; one that is needed again is made from what is in memory.

    Before each task PySpark lets all importers read their directories again, and before Python
    3.13 that of pyspark.zip takes a quarter of a second.
    """
    for path, importer in list(sys.path_importer_cache.items()):
        if isinstance(importer, zipimporter):
            del sys.path_importer_cache[path]


@functools.cache
def _freeze() -> None:
    """Exempt from garbage collection what is there by now: libraries, which stay.

    PySpark collects after each task, and looks at all objects of all libraries.
    """
    gc.collect()
    gc.freeze()
