"""The minimal work of a prediction as a bare loop: the upper limit for benchmarks/predict.py.

A module of its own, because the processes that run it import it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medspark.images.decode import decode
from medspark.images.deidentify import Pseudonyms
from medspark.images.limits import Limits
from medspark.memory import keep_freed_memory
from medspark.models.prediction import answer_of, as_pixels, rendering_of
from medspark.models.predictor import Predictor

BATCH = 64


@functools.cache
def _predictor(model: Path) -> Predictor:
    keep_freed_memory()
    torch.set_num_threads(1)
    return Predictor.load(model)


def bare(paths: list[str], number: int, *, model: Path, folder: Path) -> int:
    """Decode every file, ask the network by batches, and write a row for each."""
    predictor, pseudonyms = _predictor(model), Pseudonyms(b"k" * 32)
    settings = {"rendering": rendering_of(predictor.card), "limits": Limits()}
    rows: list[dict[str, object]] = []
    for start in range(0, len(paths), BATCH):
        chosen, images = paths[start : start + BATCH], []
        for path in chosen:
            (frame,) = decode(Path(path).read_bytes(), pseudonyms=pseudonyms, **settings)
            images.append(as_pixels(frame.pixels))
        for path, row in zip(chosen, predictor(np.stack(images)), strict=True):
            rows.append({"path": path} | answer_of(row, predictor.card))
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    return len(rows)
