"""MedMNIST archives as sources: one .npz file whose every image counts as a file.

An image's path is ``<split>/<index>``. The arrays are unpacked to a scratch file once per worker
and ingest, and mapped, so that no process ever holds them. What an archive says of itself is
checked before an array is unpacked, and none becomes larger than it declared.
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

from medspark.errors import UsageError
from medspark.images.reasons import Reason, Unreadable
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.labels import join_findings
from medspark.spark import storage

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

# What numpy writes. The decoders of other compressions return all that they find at once.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# A file is read in pieces: the list of a zip archive's members, which is read at once, is one.
_PIECE = 1 << 20
_HEADER_BYTES = 1 << 14  # numpy takes no header of more than 10,000 characters
_LABEL_BYTES = 1 << 28  # labels are read into memory
_LABEL_KINDS = "biufU"

# What zipfile, zlib and numpy raise over bytes that are not what they should be.
_DAMAGED = (
    OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError,
    OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def is_npz(source: str) -> bool:
    """Return whether ``source`` is an archive of arrays by its name."""
    return source.endswith(".npz")


def list_images(source: str, limits: ArchiveLimits) -> pa.Table:
    """Return one row of SCHEMA per image.

    A label is the class number as text, or the numbers of an image's findings (ChestMNIST).
    Raises UsageError where the archive is of another kind, or beyond ``limits``.
    """
    with _listed(source, limits) as splits:
        return pa.concat_tables([split.table() for split in splits])


def has_findings(source: str, limits: ArchiveLimits) -> bool:
    """Return whether the images of an archive have any number of findings, not one class each.

    Raises UsageError as ``list_images`` does.
    """
    with _listed(source, limits) as splits:
        shape = splits[0].labels.shape
        return len(shape) == 2 and shape[1] > 1


def read_image(source: str, path: str, *, run: str, limits: ArchiveLimits) -> bytes:
    """Return an image as the bytes of an uncompressed PNG, which decoding takes like any other.

    Another ``run`` looks at the archive anew. Raises Unreadable where it is damaged.
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
    """What a member of an archive says of the array that it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Split:
    """The images and labels of a split: headers that are true, and nothing unpacked yet."""

    archive: zipfile.ZipFile
    name: str
    images: _Array
    labels: _Array

    @classmethod
    def of(cls, archive: zipfile.ZipFile, name: str) -> _Split:
        images, labels = (_array(archive, f"{name}_{what}.npy") for what in ("images", "labels"))
        shape = images.shape
        if images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise ValueError("its images are not 8-bit and of two dimensions")
        if len(labels.shape) not in (1, 2) or labels.shape[0] != shape[0]:
            raise ValueError("its images have not one row of labels each")
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
        raise UsageError(f"{source} is not a whole MedMNIST archive: {_said(error)}.") from None


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
    """Yield an archive whose list of members is within ``limits``; else raise Unreadable."""
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
                raise ValueError("it is compressed by another method than numpy's")
            limits.check_expansion(member.compress_size, member.file_size)
        yield archive


class _Pieces:
    """A file of which no more than a piece is read at once, whatever length its bytes claim."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, or all that are left. Raises ValueError where they are many."""
        piece: bytes = self._file.read(size if 0 <= size <= _PIECE else _PIECE + 1)
        if len(piece) > _PIECE:
            raise ValueError("its list of arrays is too long")
        return piece


def _array(archive: zipfile.ZipFile, name: str) -> _Array:
    """Return what the member ``name`` holds. Raises ValueError where its header is not true."""
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


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


# By run, not by what the file says of itself: one that is written again can keep size and time.
@functools.lru_cache(maxsize=len(SPLITS))
def _mapped(
    source: str,
    split: str,
    run: str,  # noqa: ARG001 - part of what the cache goes by
    limits: ArchiveLimits,
) -> npt.NDArray[np.uint8] | Unreadable:
    """Return the images of a split, or why there are none: a worker tries once, not per image."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "images.npy"
        try:
            with (
                _opened(source, limits) as archive,
                archive.open(_array(archive, f"{split}_images.npy").name) as member,
                open(scratch, "wb") as copy,
            ):
                shutil.copyfileobj(member, copy, _PIECE)
            # The mapping outlives the name: the space is free again when the worker ends.
            mapped: npt.NDArray[np.uint8] = np.load(scratch, mmap_mode="r", allow_pickle=False)
        except Unreadable as error:
            return error
        except _DAMAGED as error:
            return Unreadable(Reason.UNREADABLE_FILE, _said(error))
        return mapped
