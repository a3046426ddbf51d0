"""A long evaluation in pieces: each is done once, by whoever, and kept until all are there.

A piece is some consecutive images of a split. Its arrays are one file in the work folder,
renamed into place when it is whole, so an evaluation that was killed goes on with the pieces
that are missing. One that is damaged counts as missing.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medspark.data.batch import to_unit
from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import Batch, attack_all
from medspark.evaluate.sanity import PROBE_STEPS
from medspark.evaluate.summary import Arrays, joined
from medspark.files import json_digest, replacing
from medspark.models.card import CARD, WEIGHTS
from medspark.models.checkpoint import load_classifier
from medspark.models.onnx import OnnxClassifier
from medspark.shards.manifest import read_manifest


@dataclass(frozen=True)
class Job:
    """All that somebody needs to do any piece of an evaluation."""

    model: Path  # a folder with model.safetensors, or an .onnx file
    surrogates: tuple[Path, ...]
    shards: Path
    split: str
    config: AttackSettings
    rows: int  # images to evaluate, the first of the split
    piece: int  # images in a piece
    work: Path

    @property
    def pieces(self) -> int:
        """How many pieces there are."""
        return -(-self.rows // self.piece)

    def file(self, number: int) -> Path:
        """Return where piece ``number`` is kept."""
        return self.work / f"piece-{number:05d}.npz"

    def missing(self) -> list[int]:
        """Return the pieces that are not done yet, or not whole."""
        return [number for number in range(self.pieces) if not self._is_whole(number)]

    def done(self) -> int:
        """Return how many images have been attacked, going by the files that are there."""
        there = sum(self.file(number).exists() for number in range(self.pieces))
        return min(there * self.piece, self.rows)

    def do(self, number: int) -> None:
        """Attack the images of piece ``number`` and keep what happened."""
        if self._is_whole(number):
            return
        arrays = attack_all(
            _network(self.model),
            self._batches(number),
            self.config,
            surrogates=[_network(path) for path in self.surrogates],
        )
        _write(self.file(number), arrays)

    def arrays(self) -> Arrays:
        """Return what happened to all images, once every piece is done."""
        return joined([_read(self.file(number)) for number in range(self.pieces)])

    def _is_whole(self, number: int) -> bool:
        try:
            rows = _read(self.file(number))["rows"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return np.array_equal(rows, self._rows(number))

    def _rows(self, number: int) -> range:
        return range(number * self.piece, min((number + 1) * self.piece, self.rows))

    def _batches(self, number: int) -> Iterator[Batch]:
        split = MappedSplit(self.shards, read_manifest(self.shards), self.split)
        rows = np.asarray(self._rows(number))
        for begin in range(0, len(rows), self.config.batch_size):
            yield load_batch(split, rows[begin : begin + self.config.batch_size])


def load_batch(split: MappedSplit, rows: np.ndarray) -> Batch:  # type: ignore[type-arg]
    """Return ``rows`` of ``split`` as images in [0, 1], labels and row numbers."""
    images, labels = split.gather(rows)
    pixels = to_unit(torch.from_numpy(images).permute(0, 3, 1, 2), torch.device("cpu"))
    return pixels, torch.from_numpy(labels), torch.from_numpy(rows)


def fingerprint(job: Job, *, dataset_digest: str) -> str:
    """Return what tells this evaluation from others: network, data and attacks, not the place."""
    decisive: dict[str, Any] = {
        "models": [_sha256(path) for path in (job.model, *job.surrogates)],
        "data": [dataset_digest, job.split, job.rows, job.piece],
        "config": job.config.model_dump(mode="json", exclude={"sanity"}),
    }
    if job.config.sanity_images and job.config.steps != PROBE_STEPS:
        # Pieces of earlier versions were probed with as many steps as their PGD took.
        decisive["probe_steps"] = PROBE_STEPS
    return json_digest(decisive)[:16]


# A worker does many pieces and should read its networks once.
@lru_cache(maxsize=8)
def _network(path: Path) -> nn.Module:
    return OnnxClassifier(path) if path.suffix == ".onnx" else load_classifier(path)


def _sha256(path: Path) -> str:
    files = [path] if path.is_file() else [path / WEIGHTS, path / CARD]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write(path: Path, arrays: Arrays) -> None:
    with replacing(path, durable=True) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}
