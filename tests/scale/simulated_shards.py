"""Shards of any number of rows without pixels: real files whose pixels are holes on disk."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medspark.shards.manifest import Manifest, Shard, Split, digest_of, write_manifest
from medspark.shards.schema import PixelFormat, write_shard

FORMAT = PixelFormat(64, 64, 1, 8)
CLASSES = ("normal", "pneumonia")
SHARD_ROWS = (64 << 20) // FORMAT.nbytes  # as many as jobs/shard.py puts into a file
_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def write(folder: Path, rows: int) -> Manifest:
    """Write a dataset of ``rows`` rows below ``folder`` and return its manifest."""
    (folder / "data").mkdir(parents=True)
    splits = {name: _split(folder, name, round(rows * share)) for name, share in _SHARES.items()}
    manifest = Manifest(
        digest=digest_of(splits), generation="simulated", classes=CLASSES, seed=0, splits=splits,
        height=FORMAT.height, width=FORMAT.width, channels=FORMAT.channels, bits=FORMAT.bits,
        leak_check={}, source={},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def _split(folder: Path, name: str, rows: int) -> Split:
    first = folder / "template.parquet"
    template = _hollow(first, SHARD_ROWS)
    shards = []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        place = f"data/{name}-{number:05d}.parquet"
        count = min(SHARD_ROWS, rows - start)
        if count == SHARD_ROWS:
            _sparse_copy(template, folder / place)
        else:
            _hollow(folder / place, count)
        size = (folder / place).stat().st_size
        shards.append(Shard(path=place, rows=count, bytes=size, sha256="0" * 64))
    first.unlink()
    counts = (rows - rows // 2, rows // 2)
    return Split(rows=rows, patients=rows, class_counts=counts, shards=tuple(shards))


def _hollow(path: Path, rows: int) -> Path:
    """Write a shard, and give the blocks of its pixels back to the disk."""
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(FORMAT.nbytes), rows, [None, pa.py_buffer(bytes(rows * FORMAT.nbytes))]
    )
    empty = pa.array([""] * rows)
    labels = pa.array(np.arange(rows, dtype=np.int32) % 2)
    columns = [empty, empty, pa.nulls(rows, pa.string()), labels, pixels]
    table = pa.Table.from_arrays(columns, schema=FORMAT.schema)
    write_shard(path, [table], FORMAT, rows_per_group=256)
    descriptor = os.open(path, os.O_RDWR)
    try:
        for offset, size in _pixel_pages(path):
            _punch(descriptor, offset, size)
    finally:
        os.close(descriptor)
    return path


def _pixel_pages(path: Path) -> list[tuple[int, int]]:
    metadata = pq.read_metadata(path)
    chunks = [metadata.row_group(group).column(4) for group in range(metadata.num_row_groups)]
    # The page's header stays; holes are of whole blocks.
    return [(c.data_page_offset + 128, c.total_compressed_size - 128) for c in chunks]


def _punch(descriptor: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    start, stop = -(-offset // 4096) * 4096, (offset + size) // 4096 * 4096
    asked = libc.fallocate(
        descriptor, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(start), ctypes.c_long(stop - start)
    )
    if asked:
        raise OSError(ctypes.get_errno(), "this file system has no holes")


def _sparse_copy(source: Path, target: Path) -> None:
    old = os.open(source, os.O_RDONLY)
    new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        end, place = os.fstat(old).st_size, 0
        while place < end:
            hole = os.lseek(old, place, os.SEEK_HOLE)
            os.pwrite(new, os.pread(old, hole - place, place), place)
            place = _next_data(old, hole, end)
        os.ftruncate(new, end)
    finally:
        os.close(old)
        os.close(new)


def _next_data(descriptor: int, place: int, end: int) -> int:
    try:
        return os.lseek(descriptor, place, os.SEEK_DATA)
    except OSError:  # only a hole is left, or nothing
        return end
