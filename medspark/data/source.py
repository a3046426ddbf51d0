"""A folder of shards as this process sees it: checked, local, and opened by the chosen reader."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field

from medspark.config import Config
from medspark.data.augment import AugmentConfig
from medspark.data.batch import Reader
from medspark.data.native import MappedSplit, NativeReader
from medspark.data.petastorm import PetastormReader, check_petastorm
from medspark.errors import UsageError
from medspark.shards.manifest import Manifest, read_manifest, verify

__all__ = ["DataConfig", "Source", "open_source"]

_LOGGER = logging.getLogger(__name__)


class DataConfig(Config):
    """How shards are read."""

    reader: Literal["native", "petastorm"] = Field(
        "native", description="what reads the shards; native is the faster one by far"
    )
    augment: AugmentConfig = AugmentConfig()
    verify: Literal["contents", "size"] = Field(
        "contents", description="what is checked before the first step; contents means SHA-256"
    )
    prefetch: int = Field(4, ge=1, description="batches that are prepared ahead")
    window: int = Field(2048, ge=1, description="rows that the petastorm reader shuffles at a time")
    cache_dir: Path | None = Field(
        None, description="local folder that remote shards are copied to"
    )


class Source:
    """The splits of one dataset of shards."""

    def __init__(self, folder: Path, manifest: Manifest, config: DataConfig) -> None:
        self.folder = folder
        self.manifest = manifest
        self._config = config

    def training(self, *, global_batch: int, seed: int, rank: int, world: int) -> Reader:
        """Return the reader of this rank's augmented, shuffled training batches."""
        if self._config.reader == "native":
            return NativeReader(
                self.split("train"),
                global_batch=global_batch,
                seed=seed,
                rank=rank,
                world=world,
                augmentation=self._config.augment,
            )
        return PetastormReader(
            self.folder,
            self.manifest,
            "train",
            global_batch=global_batch,
            seed=seed,
            rank=rank,
            world=world,
            window=self._config.window,
            augmentation=self._config.augment,
        )

    def split(self, name: str) -> MappedSplit:
        """Return the rows of a split by number. Raises UsageError where it has none."""
        if name not in self.manifest.splits or self.manifest.splits[name].rows == 0:
            raise UsageError(f"The shards in {self.folder} have no {name} images.")
        return MappedSplit(self.folder, self.manifest, name)


def open_source(shards: str | Path, config: DataConfig) -> Source:
    """Return the dataset at ``shards``, checked file by file against its manifest.

    Raises UsageError that names the file which is missing or damaged, or says what to install for
    the chosen reader.
    """
    if config.reader == "petastorm":
        check_petastorm()
    folder = Path(shards)
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=config.verify == "contents")
    return Source(folder, manifest, config)
