"""The folder of a sample dataset: parts with pixels, a ledger, and a manifest that commits them.

    manifest.json                      what the dataset is; replaced last, all at once
    data/<generation>/*.parquet        samples with their pixels, only ever added to
    ledger/<generation>/*.parquet      what became of every file; says which rows of data count
    quarantine/<generation>/*.parquet  the files that could not be used, and why
    staging/                           of an ingest that runs, or was killed

Whatever the manifest does not name does not exist for readers. So an ingest that is killed at any
moment leaves the old dataset, and the next one clears what it left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from medspark.errors import UsageError
from medspark.images.frame import Attributes, Rendered
from medspark.ingest import storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

# Rows wait in memory for a row group to fill: enough for good pages, little beside a worker.
_GROUP_BYTES = 8 << 20
_GROUP_ROWS = 4096


class Part(BaseModel):
    """A Parquet file, relative to the dataset's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    rows: int
    bytes: int
    sha256: str


class SamplesManifest(BaseModel):
    """What a sample dataset holds and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    generation: str
    previous: str | None
    # Independent of file names and of the order of rows: equal samples, equal digest.
    digest: str
    counts: dict[str, int]
    rendering: dict[str, Any]
    # Proves that the next ingest uses the same key, and says nothing about it.
    key_check: str
    parts: tuple[Part, ...]
    ledger: tuple[str, ...]
    quarantine: tuple[str, ...]


class SampleSet:
    """The folder of a sample dataset, local or on any file system that fsspec and Spark share."""

    def __init__(self, url: str) -> None:
        self.url = storage.normalise(url)

    def path(self, *names: str) -> str:
        """Return the path of a file or folder of the dataset."""
        return storage.join(self.url, "/".join(names))

    def manifest(self) -> SamplesManifest | None:
        """Return what the dataset holds, or None where no ingest has finished yet."""
        path = self.path(MANIFEST)
        text = storage.read_text(path)
        if text is None:
            return None
        try:
            record = json.loads(text)
            version = record.get("schema_version")
            if version != SCHEMA_VERSION:
                raise UsageError(
                    f"{path} has schema version {version}; this medspark reads {SCHEMA_VERSION}."
                )
            return SamplesManifest.model_validate(record)
        except (ValueError, AttributeError, ValidationError) as error:
            raise UsageError(f"{path} is not a manifest of samples.") from error

    def commit(self, manifest: SamplesManifest) -> None:
        """Make ``manifest`` the content of the dataset, all at once."""
        storage.write_text(self.path(MANIFEST), manifest.model_dump_json(indent=1))

    def clean(self) -> None:
        """Remove what no manifest names: the remains of ingests that did not finish.

        The generation before the current one is left for readers that are still at it.
        """
        manifest = self.manifest()
        kept = {manifest.generation, manifest.previous} if manifest else set()
        parts = {part.path for part in manifest.parts} if manifest else set()
        storage.remove(self.path("staging"))
        for kind in ("ledger", "quarantine"):
            for generation in self._names(kind):
                if generation not in kept:
                    storage.remove(self.path(kind, generation))
        for generation in self._names("data"):
            self._clean_parts(generation, parts)

    def _clean_parts(self, generation: str, parts: set[str]) -> None:
        names = self._names("data", generation)
        kept = [name for name in names if f"data/{generation}/{name}" in parts]
        if not kept:
            storage.remove(self.path("data", generation))
            return
        for name in set(names) - set(kept):
            storage.remove(self.path("data", generation, name))

    def _names(self, *below: str) -> list[str]:
        folder = self.path(*below)
        if not storage.is_folder(folder):
            return []
        return [entry.path.rpartition("/")[2] for entry in storage.children(folder)]


# --- parts ------------------------------------------------------------------------------------

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
