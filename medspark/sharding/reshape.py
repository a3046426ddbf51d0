"""Read samples, convert them to one format, and write shards, in Spark tasks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medspark import ownership, storage
from medspark.errors import RunError, UsageError
from medspark.files import sha256_of
from medspark.images.rendering import resize
from medspark.ingest.parts import check_part
from medspark.ingest.sample_set import GENERATION
from medspark.sharding.layout import Layout
from medspark.shards.manifest import NAME, read_manifest
from medspark.shards.schema import PixelFormat, write_shard

# Columns that readers send to writers through Spark's shuffle, and columns that writers report.
PLACED = (
    "bucket int, position bigint, sample_key string, patient_key string, site string, label int, "
    "pixels binary"
)
WRITTEN = "bucket int, path string, rows bigint, bytes bigint, sha256 string"
# Names of shards, finished or unfinished, below the folder of their generation.
_FILE = (
    r"(train|val|test)-\d{5,}\.parquet|\.(train|val|test)-\d{5,}\.parquet\.[0-9a-f]{8}(\.partial)?"
)


@dataclass(frozen=True)
class ReadSamples:
    """Reads the pixels of rows sorted by part and row, and converts them to one format."""

    samples: str
    parts: dict[str, tuple[int, str]]
    pixel_format: PixelFormat

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = (row for batch in batches for row in batch.to_pylist())
        for part, group in itertools.groupby(rows, key=lambda row: str(row["part"])):
            yield from self._part(part, group)

    def _part(self, part: str, rows: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
        system, path = storage.filesystem(storage.join(self.samples, part))
        check_part(self.samples, part, *self.parts[part])
        with system.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            start, group = 0, 0
            wanted = next(rows, None)
            while wanted is not None:
                stop = start + parquet.metadata.row_group(group).num_rows
                group_rows = []
                while wanted is not None and wanted["row"] < stop:
                    group_rows.append(wanted)
                    wanted = next(rows, None)
                if group_rows:
                    yield self._group(parquet, group, start, group_rows)
                start, group = stop, group + 1

    def _group(
        self, parquet: pq.ParquetFile, group: int, start: int, rows: list[dict[str, Any]]
    ) -> pa.RecordBatch:
        columns = ["sample_key", "pixels", "height", "width", "channels", "bits"]
        table = parquet.read_row_group(group, columns=columns)
        pixels = []
        for row in rows:
            index = row["row"] - start
            sample = {name: table[name][index].as_py() for name in columns}
            if sample["sample_key"] != row["sample_key"]:
                raise RunError(f"{parquet} does not match the ledger.")
            pixels.append(bring_to(self.pixel_format, sample))
        return pa.RecordBatch.from_pydict(
            {
                "bucket": pa.array([row["bucket"] for row in rows], pa.int32()),
                "position": pa.array([row["position"] for row in rows], pa.int64()),
                "sample_key": [row["sample_key"] for row in rows],
                "patient_key": [row["patient_key"] for row in rows],
                "site": pa.array([row["site"] for row in rows], pa.string()),
                "label": pa.array([row["number"] for row in rows], pa.int32()),
                "pixels": pa.array(pixels, pa.binary()),
            }
        )


def bring_to(pixel_format: PixelFormat, sample: dict[str, Any]) -> bytes:
    """Return the bytes of a sample's pixels in ``pixel_format``: size, depth, channels (HWC)."""
    if all(sample[name] == getattr(pixel_format, name) for name in _FORMAT):
        return bytes(sample["pixels"])
    dtype = np.dtype("<u1") if sample["bits"] == 8 else np.dtype("<u2")
    shape = (sample["height"], sample["width"], sample["channels"])
    image: npt.NDArray[Any] = np.frombuffer(sample["pixels"], dtype).reshape(shape)
    image = _with_channels(image, pixel_format.channels)
    if image.shape[:2] != (pixel_format.height, pixel_format.width):
        plane = image[..., 0] if image.shape[2] == 1 else image
        image = resize(plane, pixel_format.height, pixel_format.width).reshape(pixel_format.shape)
    if sample["bits"] > pixel_format.bits:
        image = (image.astype(np.uint32) + 128) // 257  # 65535 becomes 255, with rounding
    return image.astype(pixel_format.dtype).tobytes()


_FORMAT = ("height", "width", "channels", "bits")


def _with_channels(image: npt.NDArray[Any], channels: int) -> npt.NDArray[Any]:
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    weights = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as in PS3.3 C.7.6.3.1.2
    grey: npt.NDArray[Any] = np.rint(image @ weights).astype(image.dtype)[..., None]
    return grey


@dataclass(frozen=True)
class WriteShards:
    """Writes shards from rows sorted by file and position."""

    shards: str
    generation: str
    layout: Layout
    pixel_format: PixelFormat
    rows_per_group: int

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        pieces = (
            piece for batch in batches for piece in _by_bucket(pa.Table.from_batches([batch]))
        )
        for bucket, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
            yield self._file(bucket, (table for _, table in group))

    def _file(self, bucket: int, tables: Iterator[pa.Table]) -> pa.RecordBatch:
        name = f"data/{self.generation}/{self.layout.file_name(bucket)}"
        # A task that runs twice writes the same bytes to the same name, atomically.
        typed = (_as_shard_rows(table, self.pixel_format) for table in tables)
        with storage.draft_of(storage.join(self.shards, name)) as draft:
            rows = write_shard(draft, typed, self.pixel_format, rows_per_group=self.rows_per_group)
            size, sha256 = draft.stat().st_size, sha256_of(draft)
        return pa.RecordBatch.from_pydict(
            {
                "bucket": pa.array([bucket], pa.int32()),
                "path": [name],
                "rows": pa.array([rows], pa.int64()),
                "bytes": pa.array([size], pa.int64()),
                "sha256": [sha256],
            }
        )


def clean_shards(folder: Path) -> None:
    """Remove shards that the manifest does not name: older ones, and leftovers of failed jobs."""
    named: set[str] = set()
    if storage.is_file(storage.join(storage.normalise(folder), NAME)):
        try:
            splits = read_manifest(folder).splits.values()
        except UsageError:
            return  # the shards that it names are unknown, so remove nothing
        named = {shard.path for split in splits for shard in split.shards}
    ownership.remove(folder, [f"data/{GENERATION}/{_FILE}"], keep=named)


def _by_bucket(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Split a table at each change of ``bucket``; yield (bucket, rows)."""
    buckets = table["bucket"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(buckets)]
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            yield (
                int(buckets[start]),
                table.slice(start, stop - start).drop_columns(["bucket", "position"]),
            )


def _as_shard_rows(table: pa.Table, pixel_format: PixelFormat) -> pa.Table:
    """Return ``table`` with its pixels as fixed-size binary values, without copying them."""
    index = table.schema.get_field_index("pixels")
    chunks = [_fixed_size(chunk, pixel_format.nbytes) for chunk in table["pixels"].chunks]
    return table.set_column(index, "pixels", pa.chunked_array(chunks)).cast(pixel_format.schema)


def _fixed_size(values: pa.BinaryArray, nbytes: int) -> pa.FixedSizeBinaryArray:
    # Arrow has no cast for this. The values are contiguous, so only the offsets are dropped.
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    if not (np.diff(ends) == nbytes).all():
        raise RunError(f"A sample does not have the {nbytes} bytes that its format requires.")
    body = data.slice(int(ends[0]), len(values) * nbytes)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(nbytes), len(values), [None, body])
