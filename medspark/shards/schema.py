"""The Parquet layout of training shards: pixels that are read without decoding or copying.

``pixels`` is a required FIXED_LEN_BYTE_ARRAY column, PLAIN-encoded and uncompressed, with one data
page per row group (Parquet format, Encodings.md and README "Column chunks"). The bytes of the page
are the images, one after another. Any Parquet reader can open the file; medspark maps it into
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medspark.errors import UsageError
from medspark.shards.mapping import map_file

SPLITS = ("train", "val", "test")

# Bits of an int32 without its sign.
MOST_FINDINGS = 31

# The format stores a page's size as a signed 32-bit number; half of its range leaves a margin.
_LARGEST_GROUP = 2**30


@dataclass(frozen=True)
class PixelFormat:
    """The size, channels and depth that all images of a dataset share."""

    height: int
    width: int
    channels: int
    bits: int

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """The little-endian unsigned type of one value."""
        return np.dtype("<u1") if self.bits == 8 else np.dtype("<u2")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (H, W, C)."""
        return self.height, self.width, self.channels

    @property
    def nbytes(self) -> int:
        """The number of bytes of one image."""
        return self.height * self.width * self.channels * self.bits // 8

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of a shard. Only ``site`` may hold nulls."""
        return pa.schema(
            [
                pa.field("sample_key", pa.string(), nullable=False),
                pa.field("patient_key", pa.string(), nullable=False),
                pa.field("site", pa.string()),
                pa.field("label", pa.int32(), nullable=False),
                pa.field("pixels", pa.binary(self.nbytes), nullable=False),
            ]
        )


def write_shard(
    path: str | Path, tables: Iterable[pa.Table], pixel_format: PixelFormat, *, rows_per_group: int
) -> int:
    """Write ``tables`` as one shard file and return its number of rows.

    Every row group but the last has ``rows_per_group`` rows, or fewer if these exceed 1 GiB.
    """
    group = max(1, min(rows_per_group, _LARGEST_GROUP // pixel_format.nbytes))
    schema, rows = pixel_format.schema, 0
    writer = pq.ParquetWriter(
        path,
        schema,
        compression="NONE",
        use_dictionary=["patient_key", "site"],
        write_statistics=["label"],
        data_page_size=_LARGEST_GROUP,
        data_page_version="1.0",
        write_batch_size=group,
    )
    with writer:
        for table in _recut(tables, group):
            writer.write_table(table.select(schema.names).cast(schema), row_group_size=group)
            rows += table.num_rows
    return rows


def _recut(tables: Iterable[pa.Table], rows: int) -> Iterable[pa.Table]:
    pending: list[pa.Table] = []
    held = 0
    for table in tables:
        while table.num_rows:
            piece = table.slice(0, rows - held)
            table = table.slice(piece.num_rows)
            pending.append(piece)
            held += piece.num_rows
            if held == rows:
                yield pa.concat_tables(pending).combine_chunks()
                pending, held = [], 0
    if held:
        yield pa.concat_tables(pending).combine_chunks()


def map_pixels(
    path: str | Path, pixel_format: PixelFormat, metadata: pq.FileMetaData | None = None
) -> list[npt.NDArray[np.generic]]:
    """Return the pixels of each row group of a shard, (N, H, W, C), as views of the mapped file.

    Pixels are read from disk when they are accessed, without copying or decoding. The views keep
    the mapping alive. ``metadata`` is the file's, if it was read already. Raises UsageError if the
    file does not have the layout of a shard.
    """
    metadata = metadata or pq.read_metadata(path)
    if metadata.num_rows == 0:
        return []
    mapped = map_file(path)
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if "pixels" not in names:
        raise UsageError(f"{path} is not a training shard: it has no column 'pixels'.")
    column = names.index("pixels")
    views = []
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        chunk = about.column(column)
        views.append(_page_body(mapped, path, chunk, about.num_rows, pixel_format))
    return views


def _page_body(
    mapped: npt.NDArray[np.uint8],
    path: str | Path,
    chunk: pq.ColumnChunkMetaData,
    rows: int,
    pixel_format: PixelFormat,
) -> npt.NDArray[np.generic]:
    # A required column has no levels, so only the values follow the page's header.
    body = rows * pixel_format.nbytes
    header = chunk.total_compressed_size - body
    plain = chunk.compression == "UNCOMPRESSED" and chunk.dictionary_page_offset is None
    if not plain or not 0 < header <= 128:
        raise UsageError(
            f"{path} does not have the layout of a training shard with {pixel_format.shape} images "
            f"of {pixel_format.bits} bits; write it again with jobs/shard.py."
        )
    start = chunk.data_page_offset + header
    pixels: npt.NDArray[np.generic] = mapped[start : start + body].view(pixel_format.dtype)
    return pixels.reshape(rows, *pixel_format.shape)


def read_labels(path: str | Path, metadata: pq.FileMetaData | None = None) -> npt.NDArray[np.int64]:
    """Return the stored labels of a shard, (N,), in the order of its rows."""
    column = _read_column(path, "label", metadata)
    labels: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


def _read_column(
    path: str | Path, name: str, metadata: pq.FileMetaData | None = None
) -> pa.ChunkedArray:
    file = pq.ParquetFile(path, metadata=metadata)
    return file.read(columns=[name], use_threads=False)[name]


def findings_of(masks: npt.NDArray[np.generic], count: int) -> npt.NDArray[np.float32]:
    """Return the findings in stored masks (N,): 0 or 1 for each of ``count`` findings, (N, K)."""
    bits = np.arange(count, dtype=np.int64)
    findings: npt.NDArray[np.float32] = (masks.astype(np.int64)[:, None] >> bits & 1).astype("f4")
    return findings


def read_patients(path: str | Path) -> npt.NDArray[np.str_]:
    """Return the patient keys of a shard, (N,), in the order of its rows."""
    return np.asarray(_read_column(path, "patient_key").to_pylist(), dtype=np.str_)


def read_sites(path: str | Path) -> npt.NDArray[np.str_]:
    """Return the sites of a shard, (N,), in the order of its rows; "" for an unknown site.

    Shards of schema versions 1 and 2 have no sites, so all are "".
    """
    if "site" not in pq.read_schema(path).names:
        return np.full(pq.read_metadata(path).num_rows, "")
    sites = _read_column(path, "site").to_pylist()
    return np.asarray([site or "" for site in sites], dtype=np.str_)
