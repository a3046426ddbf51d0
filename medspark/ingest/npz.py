"""MedMNIST archives as sources: one .npz file whose every image counts as a file.

An image's path is ``<split>/<index>``. The arrays are unpacked to a scratch file once per worker
and mapped, so that no process ever holds them.
"""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from medspark.errors import UsageError
from medspark.ingest import storage
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


def is_npz(source: str) -> bool:
    """Return whether ``source`` is an archive of arrays by its name."""
    return source.endswith(".npz")


def list_images(source: str) -> pa.Table:
    """Return one row of SCHEMA per image. Raises UsageError where the archive is of another kind.

    A label is the class number as text, or the numbers of an image's findings (ChestMNIST).
    """
    if not storage.is_file(source):
        raise UsageError(f"There is no source {source}.")
    tables = []
    try:
        system, path = storage.filesystem(source)
        with system.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            for split in SPLITS:
                if f"{split}_images.npy" in archive.namelist():
                    tables.append(_table(archive, split))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{source} is not a whole MedMNIST archive: {error}.") from None
    if not tables:
        raise UsageError(f"{source} is not a MedMNIST archive: it has no train_images.")
    return pa.concat_tables(tables)


def _table(archive: zipfile.ZipFile, split: str) -> pa.Table:
    with archive.open(f"{split}_images.npy") as member:
        shape, dtype = _header(member)
    with archive.open(f"{split}_labels.npy") as member:
        labels = _FORMAT.read_array(member, allow_pickle=False)
    if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise ValueError("its images are not 8-bit and of two dimensions")
    if labels.ndim > 2 or len(labels) != shape[0]:
        raise ValueError("its images have not one row of labels each")
    count = shape[0]
    info = archive.getinfo(f"{split}_images.npy")
    columns = {
        "path": [f"{split}/{index}" for index in range(count)],
        "size": np.full(count, int(np.prod(shape[1:]))),
        "modified": np.full(count, info.CRC),
        "label": [_text(row) for row in labels.reshape(len(labels), -1)],
        "split": [split] * count,
    }
    return pa.table(columns, schema=SCHEMA)


def _text(row: npt.NDArray[Any]) -> str:
    if len(row) == 1:
        return str(row[0])
    return join_findings((f"{number:02d}" for number in row.nonzero()[0]), no_finding="")


def has_findings(source: str) -> bool:
    """Return whether the images of an archive have any number of findings, not one class each."""
    system, path = storage.filesystem(source)
    with (
        system.open(path, "rb") as file,
        zipfile.ZipFile(file) as archive,
        archive.open(next(n for n in archive.namelist() if n.endswith("_labels.npy"))) as member,
    ):
        shape, _ = _header(member)
        return len(shape) == 2 and shape[1] > 1


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = _FORMAT.read_magic(member)
    read = _FORMAT.read_array_header_1_0 if version == (1, 0) else _FORMAT.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def read_image(source: str, path: str) -> bytes:
    """Return an image as the bytes of an uncompressed PNG, which decoding takes like any other."""
    split, _, index = path.partition("/")
    pixels = _mapped(source, split)[int(index)]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=0)
    return file.getvalue()


@functools.lru_cache(maxsize=len(SPLITS))
def _mapped(source: str, split: str) -> npt.NDArray[np.uint8]:
    system, path = storage.filesystem(source)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "images.npy"
        with (
            system.open(path, "rb") as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{split}_images.npy") as member,
            open(scratch, "wb") as copy,
        ):
            shutil.copyfileobj(member, copy, 1 << 20)
        # The mapping outlives the name: the space is free again when the worker ends.
        mapped: npt.NDArray[np.uint8] = np.load(scratch, mmap_mode="r", allow_pickle=False)
        return mapped
