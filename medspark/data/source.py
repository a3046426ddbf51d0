"""A folder of shards as this process sees it: checked, local, and opened by the chosen reader."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import fsspec
import numpy as np

from medspark import ownership
from medspark.data.batch import Reader
from medspark.data.config import DataConfig, check_data
from medspark.data.native import MappedSplit, NativeReader
from medspark.data.petastorm import PetastormReader
from medspark.errors import UsageError
from medspark.files import replacing, write_whole
from medspark.shards.manifest import NAME, Manifest, read_manifest, verify
from medspark.shards.portion import portion
from medspark.shards.schema import read_patients

__all__ = ["Source", "localise", "open_source"]

_LOGGER = logging.getLogger(__name__)


class Source:
    """The splits of one dataset of shards."""

    def __init__(
        self, folder: Path, manifest: Manifest, config: DataConfig, *, seed: int = 0
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._config = config
        self._seed = seed

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
        """Return the rows of a split by number, of train those that ``data.share`` leaves.

        Raises UsageError where there are none.
        """
        if name not in self.manifest.splits or self.manifest.splits[name].rows == 0:
            raise UsageError(f"The shards in {self.folder} have no {name} images.")
        if name != "train" or self._config.share == 1:
            return MappedSplit(self.folder, self.manifest, name)
        shards = self.manifest.splits[name].shards
        patients = np.concatenate([read_patients(self.folder / shard.path) for shard in shards])
        rows = portion(patients, self._config.share, seed=self._seed)
        return MappedSplit(self.folder, self.manifest, name, rows=rows)


def open_source(shards: str | Path, config: DataConfig, *, seed: int = 0) -> Source:
    """Return the dataset at ``shards``, checked file by file against its manifest.

    ``seed`` chooses the patients where ``config`` asks for a share of them. Raises UsageError that
    names the file which is missing or damaged, or says what to install for the chosen reader.
    """
    check_data(config)
    folder = localise(str(shards), config.cache_dir)
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=config.verify == "contents")
    return Source(folder, manifest, config, seed=seed)


def localise(shards: str, cache_dir: Path | None) -> Path:
    """Return a local folder that holds the dataset at ``shards``, copied there if it is remote.

    A copy is named by the dataset's digest, so that changed data is copied anew, and files that are
    there already in the right size are not copied again. Raises UsageError where a remote dataset
    has no ``cache_dir`` to go to, one that is somebody else's, or cannot be reached.
    """
    scheme, separator, rest = shards.partition("://")
    if not separator:
        # A Path has taken one of the slashes away.
        scheme, separator, rest = shards.partition(":/")
    if not separator or "/" in scheme:
        return Path(shards)
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if cache_dir is None:
        raise UsageError(f"{shards} is remote: give data.cache_dir, a local folder to copy it to.")
    return _copy_dataset(f"{scheme}://{rest}", cache_dir)


def _copy_dataset(url: str, cache_dir: Path) -> Path:
    try:
        filesystem, root = fsspec.core.url_to_fs(url.replace("s3a://", "s3://", 1))
        content = filesystem.cat_file(f"{root}/{NAME}")
    except (OSError, ImportError, ValueError) as error:
        raise UsageError(f"{url} cannot be read: {error}") from None
    ownership.claim(cache_dir, "shard cache")
    place = cache_dir / hashlib.sha256(content).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / NAME, content.decode(), durable=True)
    for split in read_manifest(place).splits.values():
        for shard in split.shards:
            target = place / shard.path
            if target.is_file() and target.stat().st_size == shard.bytes:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Several ranks of one machine may copy at once: each has a draft of its own.
            with replacing(target) as draft:
                filesystem.get_file(f"{root}/{shard.path}", str(draft))
    return place
