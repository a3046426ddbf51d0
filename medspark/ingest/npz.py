"""Read MedMNIST archives as sources: one .npz file, each image of which counts as a file.

An image's path is ``<split>/<index>``. Each worker unpacks an array once per ingest to a scratch
file and maps it, so that no process holds it in memory. Sizes and headers are checked before an
array is unpacked, and no array unpacks to more than its declared size.
"""

from __future__ import annotations

import functools
import io
import math
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from medspark import storage
from medspark.errors import UsageError
from medspark.images.reasons import Reason, Unreadable
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.labels import join_findings

_FORMAT: Any = np.lib.format  # untyped in numpy

SPLITS = ("train", "val", "test")

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("modified", pa.int64()),
        ("label", pa.string()),
        ("split", pa.string()),
    ]
)

# The methods that numpy writes. zipfile's decoders of other methods do not bound their output.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Most bytes of one read. zipfile reads the central directory at once, so this bounds it too.
_PIECE = 1 << 20
_HEADER_BYTES = 1 << 14  # numpy rejects headers of more than 10,000 characters
_LABEL_BYTES = 1 << 28  # labels are read into memory
_LABEL_KINDS = "biufU"

# Exceptions of zipfile, zlib and numpy for damaged bytes.
_DAMAGED = (
    OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError,
    OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def is_npz(source: str) -> bool:
    """Return whether the name of ``source`` ends in .npz."""
    return source.endswith(".npz")


def list_images(source: str, limits: ArchiveLimits) -> pa.Table:
    """Return one row of SCHEMA per image.

    A label is the class number as text, or the numbers of an image's findings (ChestMNIST).
    Raises UsageError if the archive is not a MedMNIST archive, or exceeds ``limits``.
    """
    with _listed(source, limits) as splits:
        return pa.concat_tables([split.table() for split in splits])


def has_findings(source: str, limits: ArchiveLimits) -> bool:
    """Return whether the images have any number of findings, instead of one class each.

    Raises UsageError as ``list_images`` does.
    """
    with _listed(source, limits) as splits:
        shape = splits[0].labels.shape
        return len(shape) == 2 and shape[1] > 1


def read_image(source: str, path: str, *, run: str, limits: ArchiveLimits) -> bytes:
    """Return an image as the bytes of an uncompressed PNG, so that it is decoded like any file.

    A new ``run`` reads the archive again. Raises Unreadable if the archive is damaged.
    """
    split, _, index = path.partition("/")
    images = _mapped(source, split, run, limits)
    if isinstance(images, Unreadable):
        raise images
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(images[int(index)])).save(file, "PNG", compress_level=0)
    return file.getvalue()


@dataclass(frozen=True)
class _Array:
    """The header of an array in the archive."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Split:
    """The images and labels of a split, with checked headers; nothing is unpacked yet."""

    archive: zipfile.ZipFile
    name: str
    images: _Array
    labels: _Array

    @classmethod
    def of(cls, archive: zipfile.ZipFile, name: str) -> _Split:
        """Read the headers of a split. Raises ValueError if shapes or types are wrong."""
        images, labels = (_array(archive, f"{name}_{what}.npy") for what in ("images", "labels"))
        shape = images.shape
        if images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise ValueError("its images are not 8-bit and two-dimensional")
        if len(labels.shape) not in (1, 2) or labels.shape[0] != shape[0]:
            raise ValueError("it does not have one row of labels per image")
        if labels.dtype.kind not in _LABEL_KINDS:
            raise ValueError("its labels are neither numbers nor text")
        if archive.getinfo(labels.name).file_size > _LABEL_BYTES:
            raise ValueError(f"its labels have more than {_LABEL_BYTES} bytes")
        return cls(archive, name, images, labels)

    def table(self) -> pa.Table:
        """Return one row of SCHEMA per image."""
        with self.archive.open(self.labels.name) as member:
            labels = _FORMAT.read_array(member, allow_pickle=False)
        labels, count = labels[:, None] if labels.ndim == 1 else labels, len(labels)
        columns = {
            "path": [f"{self.name}/{index}" for index in range(count)],
            "size": np.full(count, math.prod(self.images.shape[1:])),
            "modified": np.full(count, self.archive.getinfo(self.images.name).CRC),
            "label": [_text(row) for row in labels],
            "split": [self.name] * count,
        }
        return pa.table(columns, schema=SCHEMA)


@contextmanager
def _listed(source: str, limits: ArchiveLimits) -> Iterator[list[_Split]]:
    if not storage.is_file(source):
        raise UsageError(f"There is no source {source}.")
    try:
        with _opened(source, limits) as archive:
            names = [name for name in SPLITS if f"{name}_images.npy" in archive.namelist()]
            splits = [_Split.of(archive, name) for name in names]
            _check_images(splits, limits)
            yield splits
    except Unreadable as error:
        raise UsageError(f"{source} is refused: {error.message} (--limits).") from None
    except _DAMAGED as error:
        raise UsageError(f"{source} is not a whole MedMNIST archive: {_text_of(error)}.") from None


def _check_images(splits: list[_Split], limits: ArchiveLimits) -> None:
    if not splits:
        raise ValueError("it has no train_images")
    count = sum(split.images.shape[0] for split in splits)
    if count > limits.npz_images:
        raise Unreadable(Reason.TOO_LARGE, f"{count} images, limit {limits.npz_images}")
    for split in splits:
        limits.check_frame(*split.images.shape[1:3])


@contextmanager
def _opened(source: str, limits: ArchiveLimits) -> Iterator[zipfile.ZipFile]:
    """Yield the archive if its members are within ``limits``; else raise Unreadable."""
    system, path = storage.filesystem(source)
    with system.open(path, "rb") as file, zipfile.ZipFile(_Pieces(file)) as archive:
        members = archive.infolist()
        if len(members) > limits.npz_arrays:
            raise Unreadable(Reason.TOO_LARGE, f"{len(members)} arrays, limit {limits.npz_arrays}")
        unpacked = sum(member.file_size for member in members)
        if unpacked > limits.npz_bytes:
            raise Unreadable(
                Reason.TOO_LARGE, f"{unpacked} bytes unpacked, limit {limits.npz_bytes}"
            )
        for member in members:
            if member.compress_type not in _COMPRESSIONS:
                raise ValueError("it uses a compression method that numpy does not write")
            limits.check_expansion(member.compress_size, member.file_size)
        yield archive


class _Pieces:
    """A file that never returns more than _PIECE bytes per read, whatever length is requested."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, or all remaining. Raises ValueError for more than _PIECE."""
        piece: bytes = self._file.read(size if 0 <= size <= _PIECE else _PIECE + 1)
        if len(piece) > _PIECE:
            raise ValueError("its list of arrays is too long")
        return piece


def _array(archive: zipfile.ZipFile, name: str) -> _Array:
    """Return the header of ``name``. Raises ValueError if it does not match the member's size."""
    with archive.open(name) as member:
        head = io.BytesIO(member.read(_HEADER_BYTES))
    version = _FORMAT.read_magic(head)
    read = _FORMAT.read_array_header_1_0 if version == (1, 0) else _FORMAT.read_array_header_2_0
    shape, _, dtype = read(head)
    claimed = head.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != archive.getinfo(name).file_size:
        raise ValueError(f"the header of {name} does not fit its size")
    return _Array(name, shape, dtype)


def _text(row: npt.NDArray[Any]) -> str:
    if len(row) == 1:
        return str(row[0])
    return join_findings((f"{number:02d}" for number in row.nonzero()[0]), no_finding="")


def _text_of(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


# The cache key holds the run, since a rewritten file can keep its size and time.
@functools.lru_cache(maxsize=len(SPLITS))
def _mapped(
    source: str,
    split: str,
    run: str,  # noqa: ARG001 - part of the cache key
    limits: ArchiveLimits,
) -> npt.NDArray[np.uint8] | Unreadable:
    """Return the images of a split, or the error, so that a worker tries once, not per image."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "images.npy"
        try:
            with (
                _opened(source, limits) as archive,
                archive.open(_array(archive, f"{split}_images.npy").name) as member,
                open(scratch, "wb") as copy,
            ):
                shutil.copyfileobj(member, copy, _PIECE)
            # The mapping outlives the file's name. The space is freed when the worker ends.
            mapped: npt.NDArray[np.uint8] = np.load(scratch, mmap_mode="r", allow_pickle=False)
        except Unreadable as error:
            return error
        except _DAMAGED as error:
            return Unreadable(Reason.UNREADABLE_FILE, _text_of(error))
        return mapped
