"""The Parquet files that hold samples with their pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from medspark.images.frame import Attributes, Rendered
from medspark.ingest import storage

# Rows wait in memory for a row group to fill, and take three times their size when it is written:
# enough for good pages, little beside a worker.
_GROUP_BYTES = 8 << 20
_GROUP_ROWS = 256


class Part(BaseModel):
    """A Parquet file, relative to the dataset's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    rows: int
    bytes: int
    sha256: str


_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _fields(record: type, prefix: str = "") -> list[pa.Field]:
    """Return Arrow fields for a dataclass of str, int, float and bool, optional or not."""
    hints = typing.get_type_hints(record)
    return [
        pa.field(prefix + field.name, _ARROW[_bare(hints[field.name])])
        for field in dataclasses.fields(record)
    ]


def _bare(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.cast(type, hint)


SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("patient_key", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("site", pa.string()),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("pixels", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("bits", pa.int32(), nullable=False),
        pa.field("pixel_sha256", pa.string(), nullable=False),
        *[field for field in _fields(Attributes) if field.name != "patient_key"],
        *_fields(Rendered, "rendered_"),
    ]
)


class PartWriter:
    """Writes samples into one Parquet file, a row group at a time, and knows its SHA-256.

    The file is made with the first row. Its name is unique, so nothing is ever overwritten.
    """

    def __init__(self, folder: str, name: str) -> None:
        """``folder`` is the dataset's; ``name`` is relative to it."""
        self.name = name
        self._url = storage.join(folder, name)
        self._columns: dict[str, list[Any]] = {field.name: [] for field in SAMPLE_SCHEMA}
        self._pending = self._bytes = 0
        self._rows = 0
        self._file: _HashingFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, sample: dict[str, Any]) -> int:
        """Add one row and return its number in the file."""
        for name, column in self._columns.items():
            column.append(sample[name])
        self._pending += 1
        self._rows += 1
        self._bytes += len(sample["pixels"])
        if self._bytes >= _GROUP_BYTES or self._pending >= _GROUP_ROWS:
            self._flush()
        return self._rows - 1

    def close(self) -> Part | None:
        """Finish the file and return what it is, or None where no row was added."""
        self._flush()
        if self._writer is None or self._file is None:
            return None
        self._writer.close()
        self._file.close()
        return Part(
            path=self.name,
            rows=self._rows,
            bytes=self._file.size,
            sha256=self._file.digest.hexdigest(),
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._open()
        table = pa.table(self._columns, schema=SAMPLE_SCHEMA)
        assert self._writer is not None
        self._writer.write_table(table, row_group_size=self._pending)
        for column in self._columns.values():
            column.clear()
        self._pending = self._bytes = 0

    def _open(self) -> None:
        system, path = storage.filesystem(self._url)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._file = _HashingFile(system.open(path, "wb"))
        dictionary = [name for name in SAMPLE_SCHEMA.names if name not in _UNIQUE]
        self._writer = pq.ParquetWriter(
            self._file,
            SAMPLE_SCHEMA,
            # Level 1 takes a quarter off radiographs at several hundred MB/s.
            compression="zstd",
            compression_level=1,
            use_dictionary=dictionary,
            write_statistics=["sample_key"],
        )


_UNIQUE = {"sample_key", "pixels", "pixel_sha256", "instance_key"}


class _HashingFile:
    """A file that hashes what is written into it; as much of a file as Parquet's writer needs."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False
