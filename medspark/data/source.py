"""Open a dataset of shards: copy it if remote, check it, and open it with the chosen reader."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import fsspec
import numpy as np
import numpy.typing as npt

from medspark import ownership
from medspark.data.batch import Reader
from medspark.data.config import DataConfig, check_data
from medspark.data.native import MappedSplit, NativeReader
from medspark.data.petastorm import PetastormReader
from medspark.errors import UsageError
from medspark.files import replacing, write_whole
from medspark.shards.groups import Groups, read_groups
from medspark.shards.manifest import NAME, Manifest, read_manifest, verify
from medspark.shards.portion import portion

__all__ = ["Source", "localise", "open_source"]

_LOGGER = logging.getLogger(__name__)


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

    def patients(self, name: str) -> npt.NDArray[np.int64]:
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
    folder = localise(str(shards), config.cache_dir)
    manifest = read_manifest(folder)
    verify(folder, manifest, contents=config.verify == "contents")
    return Source(folder, manifest, config, seed=seed)


def localise(shards: str, cache_dir: Path | None) -> Path:
    """Return a local folder with the dataset at ``shards``; copy it to ``cache_dir`` if remote.

    The copy is named by the hash of the manifest, so changed data get a new copy. Files that
    already exist with the right size are not copied again. Raises UsageError if a remote dataset
    cannot be reached, or if ``cache_dir`` is None or a folder of other files.
    """
    scheme, separator, rest = shards.partition("://")
    if not separator:
        # Path collapses the two slashes into one.
        scheme, separator, rest = shards.partition(":/")
    if not separator or "/" in scheme:
        return Path(shards)
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if cache_dir is None:
        raise UsageError(f"{shards} is remote: set data.cache_dir, a local folder to copy it to.")
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
            # Several ranks of one machine may copy at once: each writes its own draft.
            with replacing(target) as draft:
                filesystem.get_file(f"{root}/{shard.path}", str(draft))
    return place
