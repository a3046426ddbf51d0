"""A dataset of any number of rows without pixels: its manifest and its ledger, and new rows for it.

Every image has a file of its own, and two are a patient's. Keys are functions of the image's
number, so that new rows can share pixels or a patient with old ones.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import ownership
from medspark.ingest import ledger
from medspark.ingest.sample_set import SampleSet, SamplesManifest, Settled
from medspark.ingest.tally import File
from medspark.seeding import derive, hash64
from medspark.spark.task import map_batches

SOURCE = "5" * 32
GENERATION = "20260101T000000-000000"
FILE_ROWS = 1_000_000
_CHUNK = 4096
_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), "<u2")
_LABELS = pa.array(["normal", "pneumonia"])

Numbers = npt.NDArray[np.int64]


def keys(kind: str, numbers: Numbers) -> pa.Array:
    """Return the keys of a kind, 32 hexadecimal digits for each of ``numbers`` (N,)."""
    words = np.stack([hash64(derive(0, kind, half), numbers) for half in range(2)], axis=1)
    digits = _HEX[np.ascontiguousarray(words).view(np.uint8)]
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(digits))


def rows(numbers: Numbers, images: Numbers, patients: Numbers) -> dict[str, pa.Array]:
    """Return the ledger's columns for files ``numbers`` that show ``images`` of ``patients``."""
    count = len(numbers)
    return {
        "source_key": _same(SOURCE, count),
        "file_key": keys("file", numbers),
        "fingerprint": keys("fingerprint", numbers),
        "size": _same(5_000, count),
        "content_key": keys("content", numbers),
        "frame": _same(1, count),
        "outcome": _same(ledger.SAMPLE, count),
        "sample_key": keys("sample", numbers),
        "patient_key": keys("patient", patients),
        "label": _LABELS.take(pa.array(images // 2 % 2)),
        "pixel_key": keys("pixel", images),
        **{name: _same(64, count) for name in ("height", "width")},
        "channels": _same(1, count), "bits": _same(8, count),
        "part": _same(f"data/{GENERATION}/{'0' * 32}.parquet", count),
        "row": pa.array(numbers),
        "present": _same(True, count), "speaks_for_file": _same(True, count),
        "generation": _same(GENERATION, count),
    }  # fmt: skip


def _same(value: object, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), count)


def table(columns: dict[str, pa.Array], schema: pa.Schema) -> pa.Table:
    """Return ``columns`` with the types of ``schema``; missing ones are null."""
    count = len(next(iter(columns.values())))
    return pa.table(
        {
            field.name: columns[field.name].cast(field.type)
            if field.name in columns
            else pa.nulls(count, field.type)
            for field in schema
        },
        schema=schema,
    )


def write(folder: Path, count: int, *, processes: int) -> SamplesManifest:
    """Write a dataset of ``count`` samples below ``folder`` and return its manifest."""
    ownership.claim(folder, "samples")
    starts = range(0, count, FILE_ROWS)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        names = list(pool.map(partial(_file, str(folder), count), starts))
    sums = {
        "outcome": {ledger.SAMPLE: count},
        "reason": {},
        "label": {"normal": count - count // 2, "pneumonia": count // 2},
        "total": {"bytes": 5_000 * count, "frames": count, "patients": -(-count // 2)},
        "digest": {"low": 1, "high": 2},
    }
    manifest = SamplesManifest(
        generation=GENERATION, previous=None, digest="0" * 32, counts={}, rendering={},
        key_check="", parts=(), ledger=tuple(names), quarantine=(),
        settled=Settled(source_key=SOURCE, sums=sums, rows=count, superseded=0),
    )  # fmt: skip
    SampleSet(str(folder)).commit(manifest)
    return manifest


def _file(folder: str, count: int, start: int) -> str:
    name = f"ledger/{GENERATION}/{uuid.UUID(int=start).hex}.parquet"
    file = File(folder, "ledger", name)
    for first in range(start, min(start + FILE_ROWS, count), _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, start + FILE_ROWS, count))
        file.add(table(rows(numbers, numbers, numbers // 2), ledger.STORED))
    file.close()
    return name


@dataclass(frozen=True)
class Fresh:
    """Makes new rows in a task: one in a hundred copies an old image, one in fifty is of an old
    patient, the others are new images of new patients."""

    count: int
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            made = np.asarray(batch.column(0)).astype(np.int64)
            numbers = made + self.count
            images, patients = numbers.copy(), numbers // 2
            old = _old(made, self.count)
            copy, known = made % 100 == 1, made % 50 == 3
            images[copy], patients[copy] = old[copy], old[copy] // 2
            patients[known] = old[known] // 2
            columns = rows(numbers, images, patients) | {
                "outcome": _same("candidate", len(numbers)),
                "status": _same(ledger.NEW, len(numbers)),
            }
            yield from table(columns, self.schema).to_batches()


def _old(made: Numbers, count: int) -> Numbers:
    chosen: Numbers = (hash64(7, made) % np.uint64(count)).astype(np.int64)
    return chosen


def fresh(spark: SparkSession, count: int, new: int, *, tasks: int) -> tuple[DataFrame, DataFrame]:
    """Return ``new`` files for a dataset of ``count``: as touched files, and as decoded rows."""
    numbers = spark.range(0, new, numPartitions=tasks)
    text = pa.string()
    touched = pa.schema([("file_key", text), ("status", text), ("sealed_path", text)])
    decoded = pa.schema([*ledger.SCHEMA, ("sealed_path", text), ("present", pa.bool_())])
    files, frames = (
        map_batches(numbers, Fresh(count, schema), from_arrow_schema(schema))
        for schema in (touched, decoded)
    )
    return files, frames
