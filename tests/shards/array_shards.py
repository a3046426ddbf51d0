"""A folder of training shards made from arrays, as jobs/shard.py makes one from samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medspark.files import sha256_of
from medspark.shards.manifest import Manifest, Shard, Split, digest_of, write_manifest
from medspark.shards.schema import PixelFormat, write_shard

Array = npt.NDArray[Any]
CLASSES = "abcdefghij"


def write_arrays(
    folder: Path,
    splits: Mapping[str, tuple[Array, Array]],
    *,
    shards: int = 1,
    rows_per_group: int = 256,
    sites: Mapping[str, Sequence[str | None]] | None = None,
) -> Path:
    """Write images (N, H, W, C) and labels of each split, and return ``folder``.

    Labels are classes (N,), two or more, or findings (N, K) as 0 and 1.
    Every image is a patient's only one. Sample and patient keys are the split and the row.
    ``sites`` are those of each split's images; by default no site is known.
    """
    first, some = next(iter(splits.values()))
    several = some.ndim == 2
    classes = tuple(CLASSES[: some.shape[1] if several else max(2, int(some.max()) + 1)])
    pixel_format = PixelFormat(*first.shape[1:], bits=8 * first.dtype.itemsize)
    site_of = {name: (sites or {}).get(name, [None] * len(split[1]))
               for name, split in splits.items()}  # fmt: skip
    (folder / "data").mkdir(parents=True)
    written = {
        name: Split(
            rows=len(labels),
            patients=len(labels),
            class_counts=tuple(
                (labels.sum(0) if several else np.bincount(labels, minlength=len(classes))).tolist()
            ),
            sites=dict(Counter(site for site in site_of[name] if site is not None)),
            shards=tuple(
                _shard(
                    folder,
                    name,
                    number,
                    rows,
                    images,
                    stored,
                    site_of[name],
                    pixel_format,
                    rows_per_group,
                )
                for number, rows in enumerate(np.array_split(np.arange(len(labels)), shards))
            ),
        )
        for name, (images, labels) in splits.items()
        for stored in [mask_of(labels) if several else labels]
    }
    manifest = Manifest(
        digest=digest_of(written, multi_label=several),
        generation="0",
        classes=classes,
        multi_label=several,
        height=pixel_format.height,
        width=pixel_format.width,
        channels=pixel_format.channels,
        bits=pixel_format.bits,
        seed=0,
        splits=written,
        leak_check={},
        source={},
    )
    write_manifest(folder, manifest)
    return folder


def _shard(
    folder: Path,
    split: str,
    number: int,
    rows: Array,
    images: Array,
    labels: Array,
    sites: Sequence[str | None],
    pixel_format: PixelFormat,
    rows_per_group: int,
) -> Shard:
    path = f"data/{split}-{number:05d}.parquet"
    names = [f"{split}-{row}" for row in rows]
    pixels = pa.array([images[row].tobytes() for row in rows], pa.binary(pixel_format.nbytes))
    there = pa.array([sites[row] for row in rows], pa.string())
    columns = [names, names, there, pa.array(labels[rows], pa.int32()), pixels]
    table = pa.table(columns, schema=pixel_format.schema)
    count = write_shard(folder / path, [table], pixel_format, rows_per_group=rows_per_group)
    size = (folder / path).stat().st_size
    return Shard(path=path, rows=count, bytes=size, sha256=sha256_of(folder / path))


def mask_of(findings: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    """Return the stored label (N,) of images by their ``findings`` (N, K): bit k is finding k."""
    bits = np.left_shift(np.int32(1), np.arange(findings.shape[1], dtype=np.int32))
    masks: npt.NDArray[np.int32] = np.where(findings != 0, bits, 0).sum(axis=1, dtype=np.int32)
    return masks
