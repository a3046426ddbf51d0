"""Write and check parts: the Parquet files that hold samples with their pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from medspark import storage
from medspark.errors import RunError
from medspark.images.frame import Attributes, Rendered

# Size of a row group. Rows wait in memory until it is full, and writing takes three times its size:
# large enough for good pages, small beside a worker's memory.
_GROUP_BYTES = 8 << 20
_GROUP_ROWS = 256


class Part(BaseModel):
    """A Parquet file: its path relative to the dataset's folder, rows, bytes and SHA-256."""

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
        *[field for field in _fields(Attributes) if field.name != "patient_key"],
        *_fields(Rendered, "rendered_"),
    ]
)


class PartWriter:
    """Writes samples into one Parquet file, a row group at a time, and computes its SHA-256.

    The first row creates the file. Its name is unique, so nothing is ever overwritten.
    """

    def __init__(self, folder: str, name: str) -> None:
        """``folder`` is the dataset's; ``name`` is relative to it."""
        self.name = name
        self._folder = folder
        self._columns: dict[str, list[Any]] = {field.name: [] for field in SAMPLE_SCHEMA}
        self._pending = self._bytes = 0
        self._rows = 0
        self._file: _PartFile | None = None

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
        """Finish the file and return its Part, or None if no row was added."""
        self._flush()
        return self._file.close() if self._file else None

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._file is None:
            self._file = _PartFile(self._folder, self.name)
        self._file.write(pa.table(self._columns, schema=SAMPLE_SCHEMA))
        for column in self._columns.values():
            column.clear()
        self._pending = self._bytes = 0


def rewrite(folder: str, part: Part, name: str, change: Callable[[pa.Table], pa.Table]) -> Part:
    """Write ``part`` again as ``name``, with ``change`` applied to each row group in turn.

    Rows keep their order. Raises RunError if the part does not have its size or SHA-256.
    """
    check_part(folder, part.path, part.bytes, part.sha256)
    system, path = storage.filesystem(storage.join(folder, part.path))
    copy = _PartFile(folder, name)
    with system.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            copy.write(change(parquet.read_row_group(group)))
    return copy.close()


def check_part(folder: str, name: str, size: int, sha256: str) -> None:
    """Raise RunError if a part is not as the manifest says: Parquet readers would not notice."""
    system, path = storage.filesystem(storage.join(folder, name))
    if not system.exists(path) or system.size(path) != size:
        raise RunError(f"The part {name} of {folder} is missing or has another size.")
    with system.open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise RunError(f"The part {name} of {folder} has been damaged.")


class _PartFile:
    """A Parquet file of samples while it is written, with its SHA-256."""

    def __init__(self, folder: str, name: str) -> None:
        system, path = storage.filesystem(storage.join(folder, name))
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._name, self._rows = name, 0
        self._file = _HashingFile(system.open(path, "wb"))
        self._writer = pq.ParquetWriter(
            self._file,
            SAMPLE_SCHEMA,
            # Level 1 saves a quarter on radiographs, at several hundred MB/s.
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in SAMPLE_SCHEMA.names if name not in _UNIQUE],
            write_statistics=["sample_key"],
        )

    def write(self, table: pa.Table) -> None:
        """Add ``table`` as one row group."""
        self._writer.write_table(table, row_group_size=len(table))
        self._rows += len(table)

    def close(self) -> Part:
        """Finish the file and return its Part."""
        self._writer.close()
        self._file.close()
        digest = self._file.digest.hexdigest()
        return Part(path=self._name, rows=self._rows, bytes=self._file.size, sha256=digest)


_UNIQUE = {"sample_key", "pixels", "instance_key"}


class _HashingFile:
    """A file that hashes the bytes written to it; it has the methods that ParquetWriter needs."""

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
