"""Open a dataset of shards: copy it if remote, check it, and open it with the chosen reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from medspark.data.batch import Reader
from medspark.data.config import DataConfig, check_data
from medspark.data.cutmix import CutMixReader
from medspark.data.native import MappedSplit, NativeReader
from medspark.data.petastorm import PetastormReader
from medspark.errors import UsageError
from medspark.shards.groups import Groups, read_groups
from medspark.shards.local import local_shards
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.portion import portion

__all__ = ["Source", "open_source"]


class Source:
    """The splits of one dataset of shards, in a local folder."""

    def __init__(
        self, folder: Path, manifest: Manifest, config: DataConfig, *, seed: int = 0
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._config = config
        self._seed = seed
        self._splits: dict[str, MappedSplit] = {}

    def training(
        self, *, global_batch: int, seed: int, rank: int, world: int, cutmix: float = 0.0
    ) -> Reader:
        """Return the reader of this rank's augmented, shuffled training batches.

        With ``cutmix``, its images and labels are mixed (``medspark.data.cutmix``).
        """
        if self._config.reader == "native":
            reader = NativeReader(
                self.split("train"),
                global_batch=global_batch,
                seed=seed,
                rank=rank,
                world=world,
                augmentation=self._config.augment,
            )
            if cutmix == 0:
                return reader
            return CutMixReader(
                reader,
                alpha=cutmix,
                classes=len(self.manifest.classes),
                seed=seed,
                rank=rank,
                world=world,
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

    def patients(self, name: str) -> npt.NDArray[np.int32]:
        """Return the number of the patient of every image of a split, (N,)."""
        return self._grouped(name).codes

    def split(self, name: str) -> MappedSplit:
        """Return a split by name; of train, the rows that ``data.share`` selects.

        Its files are opened once. Raises UsageError if the split is missing or empty.
        """
        if name not in self._splits:
            self._splits[name] = self._opened(name)
        return self._splits[name]

    def _opened(self, name: str) -> MappedSplit:
        if name not in self.manifest.splits or self.manifest.splits[name].rows == 0:
            raise UsageError(f"The shards in {self.folder} have no {name} images.")
        split = MappedSplit(self.folder, self.manifest, name)
        if name != "train" or self._config.share == 1:
            return split
        rows = portion(self._grouped(name), self._config.share, seed=self._seed)
        return split.subset(rows)

    def _grouped(self, name: str) -> Groups:
        paths = [self.folder / shard.path for shard in self.manifest.splits[name].shards]
        return read_groups(paths, "patient_key")


def open_source(shards: str | Path, config: DataConfig, *, seed: int = 0) -> Source:
    """Return the dataset at ``shards``, with every file checked against the manifest.

    ``seed`` selects the patients if ``data.share`` is below 1. Raises UsageError that names a
    missing or damaged file, or says what to install for the chosen reader.
    """
    check_data(config)
    folder = local_shards(shards, config.cache_dir)
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=config.verify == "contents")
    return Source(folder, manifest, config, seed=seed)
