"""Detection in pieces that any worker can do and that survive a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import nn

from medspark.config import Config
from medspark.defend.detect.adaptive import Target
from medspark.defend.detect.config import AdaptiveSettings
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.examine import Examination
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.gather import gather
from medspark.defend.detect.store import StoredDetector, load_detectors, save_detectors
from medspark.documents import read_regular
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.pieces import SplitPieces, network_of
from medspark.evaluate.robust import Batch
from medspark.evaluate.summary import Array, Arrays
from medspark.files import sha256_of, write_whole
from medspark.seeding import derive
from medspark.shards.plan import permute

__all__ = ["ExamineJob", "FeatureJob", "drawn_rows", "keep_fitted"]

_ARRAYS, _DESCRIPTION = "fitted.safetensors", "fitted.json"


def drawn_rows(total: int, count: int, *, seed: int, after: int = 0) -> Array:
    """Return ``count`` rows of a split of ``total``, sorted, in an order that ``seed`` decides.

    The first ``after`` rows of that order are skipped, so two draws can share none.
    """
    places = np.arange(min(after, total), min(after + count, total))
    return np.sort(permute(places, total, derive(seed, "detect")))


@dataclass(frozen=True, kw_only=True)
class _ChosenImages(SplitPieces):
    """A network, and the ``chosen`` rows of a split that it is shown."""

    model: Path
    surrogates: tuple[Path, ...]
    shards: Path
    split: str
    chosen: tuple[int, ...]
    head: str
    bits: int
    piece: int
    work: Path

    @property
    def rows(self) -> Array:
        """The sorted rows of the images."""
        return np.array(self.chosen, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class FeatureJob(_ChosenImages):
    """All that a worker needs to gather the features of any piece."""

    layers: tuple[str, ...]
    attacks: AttackSettings

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.attacks.batch_size

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the features of the images of one piece."""
        return gather(
            Extractor.on(_frozen(self.model), self.layers, self.head),
            batches,
            self.attacks,
            bits=self.bits,
            surrogates=[network_of(path) for path in self.surrogates],
        )


@dataclass(frozen=True, kw_only=True)
class ExamineJob(_ChosenImages):
    """All that a worker needs to examine any piece; it reads the detectors from ``fitted``."""

    fitted: Path
    oblivious: AttackSettings
    adaptive: AdaptiveSettings

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.oblivious.batch_size

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the scores of the images of one piece."""
        detectors, targets = read_fitted(self.fitted)
        return Examination(
            model=_frozen(self.model),
            head=self.head,
            detectors=detectors,
            targets=targets,
            oblivious=self.oblivious,
            adaptive=self.adaptive,
            bits=self.bits,
            surrogates=[network_of(path) for path in self.surrogates],
        ).arrays(batches)


class _Spread(Config):
    """A target: the number of its detector, and the spread of its scores of clean images."""

    detector: int
    mean: float
    deviation: float


class _Fitted(Config):
    """The detectors in a file of arrays, and which of them are attacked."""

    arrays: str
    detectors: tuple[StoredDetector, ...]
    targets: tuple[_Spread, ...] = Field(max_length=1000)


def keep_fitted(folder: Path, detectors: tuple[Detector, ...], targets: tuple[Target, ...]) -> str:
    """Write detectors and targets to ``folder`` for the workers; return the arrays' SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    described = save_detectors(folder / _ARRAYS, detectors)
    places = [next(n for n, d in enumerate(detectors) if d is t.detector) for t in targets]
    document = _Fitted(
        arrays=sha256_of(folder / _ARRAYS),
        detectors=described,
        targets=tuple(
            _Spread(detector=place, mean=each.mean, deviation=each.deviation)
            for place, each in zip(places, targets, strict=True)
        ),
    )
    write_whole(folder / _DESCRIPTION, document.model_dump_json() + "\n", durable=True)
    return document.arrays


@lru_cache(maxsize=2)
def read_fitted(folder: Path) -> tuple[list[Detector], list[Target]]:
    """Return the detectors and targets that ``keep_fitted`` wrote."""
    document = _Fitted.model_validate_json(read_regular(folder / _DESCRIPTION))
    detectors, _ = load_detectors(folder / _ARRAYS, document.detectors, sha256=document.arrays)
    targets = [Target(detectors[t.detector], t.mean, t.deviation) for t in document.targets]
    return detectors, targets


def _frozen(path: Path) -> nn.Module:
    """Return the network in eval mode, its parameters without gradients.

    Batch norm is not folded, so that every layer has the values of the deployed network.
    """
    return network_of(path).eval().requires_grad_(False)
