"""A share of a dataset: fewer training images, and the same ones to validate and to test on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medspark.shards.manifest import (
    NAME,
    Manifest,
    Shard,
    Split,
    digest_of,
    read_manifest,
    sha256_of,
    write_manifest,
)
from medspark.shards.schema import write_shard

__all__ = ["training_share"]

_ROWS_PER_GROUP = 256


def training_share(shards: Path, below: Path, *, share: float) -> Path:
    """Return a dataset like ``shards`` with ``share`` of its training images, made if need be.

    Shards are shuffled, so the first rows are a random draw, and a smaller share is part of every
    larger one. The subset lies below the folder ``below``, named after data and share; all of
    ``shards`` is ``shards`` itself.
    """
    if share >= 1:
        return shards
    manifest = read_manifest(shards)
    folder = below / f"{manifest.digest[:16]}-{share:g}"
    if not (folder / NAME).is_file():
        _write(shards, folder, manifest, share)
    return folder


def _write(shards: Path, folder: Path, manifest: Manifest, share: float) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    train = manifest.splits["train"]
    table = _first_rows(shards, train, max(1, round(share * train.rows)))
    path = "data/train-subset.parquet"
    rows = write_shard(
        folder / path, [table], manifest.pixel_format, rows_per_group=_ROWS_PER_GROUP
    )
    shard = Shard(
        path=path,
        rows=rows,
        bytes=(folder / path).stat().st_size,
        sha256=sha256_of(folder / path),
    )
    counts = np.bincount(table["label"].to_numpy(), minlength=len(manifest.classes))
    fewer = Split(
        rows=rows,
        patients=pc.count_distinct(table["patient_key"]).as_py(),
        class_counts=tuple(counts.tolist()),
        shards=(shard,),
    )
    for other in _others(manifest):
        _place(shards / other.path, folder / other.path)
    splits = manifest.splits | {"train": fewer}
    changed = {
        "splits": splits,
        "digest": digest_of(splits),
        "source": manifest.source | {"training_share_of": manifest.digest, "share": share},
    }
    write_manifest(folder, manifest.model_copy(update=changed))


def _first_rows(shards: Path, split: Split, rows: int) -> pa.Table:
    tables = []
    for shard in split.shards:
        if rows <= 0:
            break
        tables.append(pq.read_table(shards / shard.path).slice(0, rows))
        rows -= shard.rows
    return pa.concat_tables(tables)


def _others(manifest: Manifest) -> Iterator[Shard]:
    for name, split in manifest.splits.items():
        if name != "train":
            yield from split.shards


def _place(source: Path, target: Path) -> None:
    """Put the file ``source`` at ``target`` as well, as a link where the disk allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
