"""Evaluate a split in pieces that any worker can do and that survive a restart.

A piece is a range of the attacked images of a split, in the order of their rows. Its arrays are one
file in the work folder, renamed into place once complete. An evaluation that was killed continues
with the missing pieces; a damaged piece counts as missing.
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

from medspark.data.native import MappedSplit
from medspark.evaluate.budgets import ENSEMBLES
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import Batch, attack_all
from medspark.evaluate.sanity import CONTROL_EVERY, PROBE_STEPS
from medspark.evaluate.summary import Array, Arrays, joined
from medspark.files import json_digest, replacing
from medspark.models.card import CARD, WEIGHTS, read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.deciding import deciding
from medspark.models.local import local_model
from medspark.models.onnx import OnnxClassifier
from medspark.shards.manifest import read_manifest


class SplitPieces:
    """Work on images of a split in pieces, each a file of arrays with one row per image."""

    shards: Path
    split: str
    piece: int  # images per piece
    work: Path

    @property
    def rows(self) -> Array:
        """The sorted rows of the images."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        raise NotImplementedError

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the arrays of the images of one piece; ``rows`` is one of them."""
        raise NotImplementedError

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return -(-len(self.rows) // self.piece)

    def file(self, number: int) -> Path:
        """Return the file of piece ``number``."""
        return self.work / f"piece-{number:05d}.npz"

    def missing(self) -> list[int]:
        """Return the numbers of the pieces that are missing or damaged."""
        return [number for number in range(self.pieces) if not self._is_whole(number)]

    def done(self) -> int:
        """Return how many images are done, judging by the existing files."""
        existing = sum(self.file(number).exists() for number in range(self.pieces))
        return min(existing * self.piece, len(self.rows))

    def do(self, number: int) -> None:
        """Work on the images of piece ``number`` and store the arrays, unless already done."""
        if not self._is_whole(number):
            _write(self.file(number), self.piece_arrays(self._batches(number)))

    def arrays(self) -> Arrays:
        """Return the arrays of all images; every piece must be done."""
        return joined([_read(self.file(number)) for number in range(self.pieces)])

    def _is_whole(self, number: int) -> bool:
        try:
            rows = _read(self.file(number))["rows"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return np.array_equal(rows, self._rows(number))

    def _rows(self, number: int) -> Array:
        return self.rows[number * self.piece : (number + 1) * self.piece]

    def _batches(self, number: int) -> Iterator[Batch]:
        split = MappedSplit(self.shards, read_manifest(self.shards), self.split)
        rows = self._rows(number)
        for begin in range(0, len(rows), self.batch_size):
            chosen = rows[begin : begin + self.batch_size]
            yield *split.tensors(chosen), torch.from_numpy(chosen)


@dataclass(frozen=True)
class AttackPieces(SplitPieces):
    """Attacks on one model, and the settings that a worker needs for any piece."""

    model: Path
    shards: Path
    split: str
    config: AttackSettings
    total: int  # images of the split; ``config.images`` of them are attacked
    piece: int
    work: Path

    @property
    def rows(self) -> Array:
        """The sorted rows of the images to attack, those that a training's report attacks."""
        return self.config.rows(self.total)

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.config.batch_size


@dataclass(frozen=True)
class Job(AttackPieces):
    """Attacks on a torch network (a folder) or an .onnx file, with surrogates for transfer."""

    surrogates: tuple[Path, ...]

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the arrays of the images under attack."""
        return attack_all(
            deciding_network(self.model),
            batches,
            self.config,
            surrogates=[network_of(path) for path in self.surrogates],
            probed_below=self.config.probed_below(self.rows),
        )


def fingerprint(job: Job, *, dataset_digest: str) -> str:
    """Return a hash of all that decides the arrays: networks, data and attacks, but no paths."""
    decisive: dict[str, Any] = {
        "models": [_sha256(path) for path in (job.model, *job.surrogates)],
        "data": [dataset_digest, job.split, len(job.rows), job.piece],
        "config": job.config.model_dump(mode="json", exclude={"sanity"}),
    }
    if job.config.sanity_images and job.config.steps != PROBE_STEPS:
        # Earlier versions ran the sanity probes with config.steps steps.
        decisive["probe_steps"] = PROBE_STEPS
    if ENSEMBLES & {*job.config.attacks} and sum(eps > 0 for eps in job.config.eps) > 1:
        # Earlier versions attacked every image at every budget.
        decisive["control_every"] = CONTROL_EVERY
    return json_digest(decisive)[:16]


# Cached, because a worker evaluates many pieces with the same networks.
@lru_cache(maxsize=8)
def network_of(path: Path) -> nn.Module:
    """Return the network in a folder or an .onnx file."""
    return OnnxClassifier(local_model(path)) if path.suffix == ".onnx" else load_classifier(path)


def deciding_network(path: Path) -> nn.Module:
    """Return the network in a folder, with its card's decision, or in an .onnx file."""
    network = network_of(path)
    return network if path.suffix == ".onnx" else deciding(network, read_card(path))


def _sha256(path: Path) -> str:
    path = local_model(path)
    files = [path] if path.is_file() else [path / WEIGHTS, path / CARD]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write(path: Path, arrays: Arrays) -> None:
    with replacing(path, durable=True) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}
