"""Judge a network with noisy weights in pieces that any worker can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from medspark.evaluate.config import AttackSettings
from medspark.evaluate.noise_result import NoiseResult
from medspark.evaluate.noisy import judged_rows, noise_arrays, noise_result
from medspark.evaluate.pieces import SplitPieces
from medspark.evaluate.robust import Batch
from medspark.evaluate.summary import Array, Arrays
from medspark.models.checkpoint import load_classifier

__all__ = ["NoisyJob"]


@dataclass(frozen=True)
class NoisyJob(SplitPieces):
    """All settings that a worker needs to judge any piece, at the largest eps."""

    model: Path
    shards: Path
    split: str
    config: AttackSettings
    total: int  # images of the split
    piece: int
    work: Path

    @property
    def rows(self) -> Array:
        """The sorted rows of the images to judge."""
        return judged_rows(self.config, self.total)

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.config.batch_size

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return whether the answers are right, by condition and draw."""
        config = self.config
        return noise_arrays(
            _noisy(self.model),
            batches,
            threat=config.threat(max(config.eps)),
            steps=config.steps,
            seed=config.seed,
        )

    def result(self) -> NoiseResult:
        """Return the figures of all images; every piece must be done."""
        threat = self.config.threat(max(self.config.eps))
        return noise_result(self.arrays(), threat=threat, steps=self.config.steps)


@lru_cache(maxsize=1)
def _noisy(path: Path) -> nn.Module:
    return load_classifier(path, noisy=True)
