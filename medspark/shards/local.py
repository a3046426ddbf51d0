"""Shards as local files: where they lie, or a copy of a remote dataset on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medspark.errors import UsageError
from medspark.files import write_whole
from medspark.remote import RemoteFile, any_path, copied, is_remote
from medspark.shards.manifest import NAME, Manifest, parse_manifest, read_content
from medspark.shards.schema import read_patients

__all__ = ["local_shards", "patients_of"]


def local_shards(folder: str | Path, cache: Path | None = None) -> Path:
    """Return a local folder with the shards of ``folder``; those of an address are copied.

    The copy is named by the hash of the manifest, so that changed data get a new copy. ``cache`` is
    the folder for copies, by default that of ``remote.cache_folder``. Raises UsageError if the
    address cannot be reached, or the cache is a folder of other files.
    """
    if not is_remote(folder):
        return any_path(folder)
    content = read_content(folder)
    shards = [
        RemoteFile(shard.path, shard.bytes, shard.sha256)
        for split in parse_manifest(folder, content).splits.values()
        for shard in split.shards
    ]
    if unsafe := [s.path for s in shards if s.path.startswith("/") or ".." in s.path.split("/")]:
        raise UsageError(f"The manifest of {folder} names a file outside of it: {unsafe[0]}.")
    name = hashlib.sha256(content).hexdigest()[:32]
    place = copied(str(any_path(folder)), shards, cache, name=name)
    if not (place / NAME).is_file():
        write_whole(place / NAME, content.decode(), durable=True)
    return place


def patients_of(folder: Path, manifest: Manifest, split: str) -> npt.NDArray[np.str_]:
    """Return the patient key of every image of a split, (N,), in the order of its rows."""
    place, shards = local_shards(folder), manifest.splits[split].shards
    keys = [read_patients(place / shard.path) for shard in shards]
    return np.concatenate([np.empty(0, dtype=np.str_), *keys])
