"""Read, write and verify the manifest of a shard folder, which names all files of the dataset.

Files that the manifest does not name are not read. A named file must have the size and SHA-256 that
the manifest gives. Parquet readers alone do not notice a missing, duplicate or bit-flipped file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from medspark import storage
from medspark.documents import parse_json, read_regular
from medspark.errors import UsageError
from medspark.files import sha256_of
from medspark.remote import any_path, is_remote
from medspark.shards.schema import MOST_FINDINGS, PixelFormat, findings_of

NAME = "manifest.json"
# Version 2 added multi_label; images of version 1 have one class each. Version 3 added sites.
SCHEMA_VERSION = 3
_READ = (1, 2, 3)
_LARGEST = 1 << 28  # bytes: more than a million shards


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Parquet file: its path below the dataset's folder, its rows, bytes and SHA-256."""

    path: str
    rows: int
    bytes: int
    sha256: str


class Split(_Record):
    """The shards of one split, in reading order.

    ``class_counts`` is the number of images of each class, or with each finding, in the order of
    the classes. ``sites`` is the number of images by site: by pseudonym, or by name if ingest was
    allowed to keep it. Images without a site are not counted there.
    """

    rows: int
    patients: int
    class_counts: tuple[int, ...]
    sites: dict[str, int] = {}
    shards: tuple[Shard, ...]


class Manifest(_Record):
    """The content of a shard folder: classes, pixel format, splits and their files."""

    schema_version: int = SCHEMA_VERSION
    digest: str
    generation: str
    classes: tuple[str, ...]
    # If true, an image has any number of the classes. Its label is a mask: bit k for class k.
    multi_label: bool = False
    height: int
    width: int
    channels: int
    bits: int
    seed: int
    splits: dict[str, Split]
    # Patients and images in two splits (both zero), overruled hints, near duplicates.
    leak_check: dict[str, int]
    # Digest, counts, rendering and split settings of the samples.
    source: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        if self.multi_label and len(self.classes) > MOST_FINDINGS:
            raise ValueError(f"a mask holds at most {MOST_FINDINGS} findings")
        return self

    @property
    def pixel_format(self) -> PixelFormat:
        """The size, channels and depth of the images."""
        return PixelFormat(self.height, self.width, self.channels, self.bits)

    def targets(self, stored: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the targets of the stored labels (N,): classes (N,), or 0/1 findings (N, K).

        Training and evaluation tell the two cases apart by this shape.
        """
        return findings_of(stored, len(self.classes)) if self.multi_label else stored


def digest_of(splits: dict[str, Split], *, multi_label: bool = False) -> str:
    """Return the dataset's digest: a SHA-256 over the split, index and SHA-256 of every shard.

    ``multi_label`` is part of it: the same numbers as masks and as classes are two datasets.
    """
    lines = ["multi_label\n"] if multi_label else []
    lines += [
        f"{name} {number} {shard.sha256}\n"
        for name, split in sorted(splits.items())
        for number, shard in enumerate(split.shards)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(
    folder: str | Path, manifest: Manifest, version: str | None = None
) -> str | None:
    """Make ``manifest`` the content of ``folder``, atomically.

    In an object store it replaces the manifest of ``version``, as ``manifest_version`` told it.
    Raises RunError if that is not there any more.
    """
    return storage.commit(_address(folder), manifest.model_dump_json(indent=1), version)


def manifest_version(folder: str | Path) -> str | None:
    """Return the version of the manifest of ``folder``; None if it is missing or has none."""
    try:
        return storage.read_version(_address(folder))[1]
    except FileNotFoundError:
        return None


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of ``folder``, a path or an address.

    Raises UsageError if it is not a folder of shards.
    """
    return parse_manifest(folder, read_content(folder))


def read_content(folder: str | Path) -> bytes:
    """Return the manifest of ``folder`` as it is stored. Raises UsageError if there is none."""
    folder = any_path(folder)
    path = folder / NAME
    try:
        if is_remote(folder):
            return storage.read_version(str(path))[0]
        if not folder.is_dir():
            raise UsageError(f"There is no shard folder {folder}.")
        if not path.is_file():
            raise FileNotFoundError(path)
        return read_regular(path, most=_LARGEST)
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no {NAME}: jobs/shard.py has not finished there."
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_manifest(folder: str | Path, content: bytes) -> Manifest:
    """Return the manifest of ``folder``, whose ``content`` was read. Raises UsageError."""
    path = any_path(folder) / NAME
    try:
        record = parse_json(content)
        version = record.get("schema_version")
        if version not in _READ:
            raise UsageError(
                f"{path} has schema version {version}; this medspark reads {SCHEMA_VERSION}."
            )
        return Manifest.model_validate(record)
    except (ValueError, AttributeError, ValidationError) as error:
        raise UsageError(f"{path} is not a manifest of training shards.") from error


def _address(folder: str | Path) -> str:
    return storage.join(storage.normalise(any_path(folder)), NAME)


def verify(folder: str | Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Check that every file exists, has its size and, with ``contents``, its SHA-256.

    An unnamed file among the shards is an error too: medspark would skip it, but other Parquet
    readers would read it as data. Raises UsageError that names the first bad file.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    if is_remote(folder):
        _verify_sizes(any_path(folder), shards)
        return
    named = {Path(folder) / shard.path for shard in shards}
    for shard in shards:
        _verify_file(Path(folder) / shard.path, shard, contents=contents)
    for place in sorted({path.parent for path in named}):
        # Spark and Hadoop use these prefixes for internal files, which readers skip.
        strays = {path for path in place.iterdir() if not path.name.startswith((".", "_"))} - named
        if strays:
            raise UsageError(
                f"{min(strays)} lies among the shards of {folder}, but the manifest does not name "
                "it; remove it, or write the shards again."
            )


def _verify_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    """Check the sizes of remote shards: their contents are checked when they are copied."""
    sizes: dict[str, int] = {}
    for place in sorted({str((folder / shard.path).parent) for shard in shards}):
        with suppress(FileNotFoundError):
            sizes |= {entry.path: entry.size for entry in storage.children(place)}
    for shard in shards:
        path = str(folder / shard.path)
        if path not in sizes:
            raise UsageError(f"The shard {path} is missing; write the shards again.")
        _check_size(path, sizes[path], shard)


def _verify_file(path: Path, shard: Shard, *, contents: bool) -> None:
    if not path.is_file():
        raise UsageError(f"The shard {path} is missing; write the shards again.")
    _check_size(path, path.stat().st_size, shard)
    if contents and sha256_of(path) != shard.sha256:
        raise UsageError(f"The shard {path} has been damaged: its SHA-256 is not the manifest's.")


def _check_size(path: str | Path, size: int, shard: Shard) -> None:
    if size != shard.bytes:
        raise UsageError(f"The shard {path} has {size} bytes instead of {shard.bytes}.")
