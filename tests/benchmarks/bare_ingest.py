"""The minimal work of an ingest as a bare loop: the upper limit for benchmarks/ingest.py.

A module of its own, because the processes that run it import it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medspark.images.decode import decode
from medspark.images.deidentify import Pseudonyms
from medspark.images.limits import Limits
from medspark.images.rendering import Rendering

SIZE = 224


def bare(paths: list[str], number: int, *, folder: Path) -> int:
    """Do the minimal work of an ingest on every file, and write the same output."""
    rendering, limits, pseudonyms = Rendering(size=SIZE), Limits(), Pseudonyms(b"k" * 32)
    rows: list[dict[str, object]] = []
    writer: pq.ParquetWriter | None = None
    for path in paths:
        content = Path(path).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        for frame in decode(content, rendering=rendering, limits=limits, pseudonyms=pseudonyms):
            row = {k: v for k, v in dataclasses.asdict(frame.attributes).items() if v is not None}
            row |= {"sha256": sha256, "pixel_sha256": frame.pixel_sha256}
            rows.append(row | {"pixels": frame.pixels.tobytes()})
        if len(rows) >= 160 or path == paths[-1]:
            # Attributes that the first file lacks are left out: a little less work than ingest has.
            table = pa.Table.from_pylist(rows, schema=writer.schema if writer else None)
            if writer is None:
                writer = pq.ParquetWriter(
                    folder / f"{number}.parquet", table.schema, compression="zstd",
                    compression_level=1,
                )  # fmt: skip
            writer.write_table(table)
            rows = []
    if writer is not None:
        writer.close()
    return len(paths)
