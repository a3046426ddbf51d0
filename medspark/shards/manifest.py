"""The manifest of a shard folder: a dataset is what its manifest names, and nothing else.

A file that the manifest does not name is not read; one that it names must have the size and the
SHA-256 that it gives. Without this, a missing, doubled or bit-flipped Parquet file is read
without an error.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from medspark.documents import parse_json, read_regular
from medspark.errors import UsageError
from medspark.shards.schema import MOST_FINDINGS, PixelFormat, findings_of

NAME = "manifest.json"
# Version 2 added multi_label; what version 1 holds is one class each. Version 3 added sites.
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

    ``class_counts`` follows the classes: the images of each, or those that have each finding.
    ``sites`` are the images of each site, by its pseudonym or, where ingest was allowed to keep
    it, its name; images of which no site is known are not among them.
    """

    rows: int
    patients: int
    class_counts: tuple[int, ...]
    sites: dict[str, int] = {}
    shards: tuple[Shard, ...]


class Manifest(_Record):
    """What a shard folder holds."""

    schema_version: int = SCHEMA_VERSION
    digest: str
    generation: str
    classes: tuple[str, ...]
    # Whether an image may have any of the classes: its label is then a mask, bit k for class k.
    multi_label: bool = False
    height: int
    width: int
    channels: int
    bits: int
    seed: int
    splits: dict[str, Split]
    # Patients found in two splits, and images found under two patients in two splits: both zero.
    leak_check: dict[str, int]
    # Where the samples came from and how they were rendered.
    source: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        if self.multi_label and len(self.classes) > MOST_FINDINGS:
            raise ValueError(f"a mask holds at most {MOST_FINDINGS} findings")
        return self

    @property
    def pixel_format(self) -> PixelFormat:
        """The size and depth of the images."""
        return PixelFormat(self.height, self.width, self.channels, self.bits)

    def targets(self, stored: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return what the stored labels (N,) say: classes (N,), or 0/1 findings (N, K).

        Everything that learns or judges tells by this shape what it has before it.
        """
        return findings_of(stored, len(self.classes)) if self.multi_label else stored


def digest_of(splits: dict[str, Split], *, multi_label: bool = False) -> str:
    """Return the dataset's digest: the SHA-256 over every shard's split, place and SHA-256.

    Masks make another dataset than the same numbers as classes.
    """
    lines = ["multi_label\n"] if multi_label else []
    lines += [
        f"{name} {number} {shard.sha256}\n"
        for name, split in sorted(splits.items())
        for number, shard in enumerate(split.shards)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Make ``manifest`` the content of ``folder``, all at once."""
    write_atomically(Path(folder) / NAME, manifest.model_dump_json(indent=1))


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader finds the old file or the new one, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_manifest(folder: str | Path) -> Manifest:
    """Return what ``folder`` holds. Raises UsageError where that is not a dataset of shards."""
    path = Path(folder) / NAME
    if not Path(folder).is_dir():
        raise UsageError(f"There is no shard folder {folder}.")
    if not path.is_file():
        raise UsageError(f"{folder} holds no {NAME}: jobs/shard.py has not finished there.")
    try:
        record = parse_json(read_regular(path, most=_LARGEST))
        version = record.get("schema_version")
        if version not in _READ:
            raise UsageError(
                f"{path} has schema version {version}; this medspark reads {SCHEMA_VERSION}."
            )
        return Manifest.model_validate(record)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, AttributeError, ValidationError) as error:
        raise UsageError(f"{path} is not a manifest of training shards.") from error


def verify(folder: str | Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Check that every file is there, has its size and, with ``contents``, its SHA-256.

    A file among the shards that the manifest does not name is refused too: readers here would pass
    over it, and every other Parquet reader would take it for data. Raises UsageError that names the
    first file which is not what the manifest says.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    named = {Path(folder) / shard.path for shard in shards}
    for shard in shards:
        _verify_file(Path(folder) / shard.path, shard, contents=contents)
    for place in sorted({path.parent for path in named}):
        # Names that begin so are what Spark and Hadoop write for themselves, and nobody reads.
        strays = {path for path in place.iterdir() if not path.name.startswith((".", "_"))} - named
        if strays:
            raise UsageError(
                f"The manifest of {folder} does not name {min(strays)}, which lies among its "
                "shards; remove it, or write the shards again."
            )


def _verify_file(path: Path, shard: Shard, *, contents: bool) -> None:
    if not path.is_file():
        raise UsageError(f"The shard {path} is missing; write the shards again.")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UsageError(f"The shard {path} has {size} bytes instead of {shard.bytes}.")
    if contents and sha256_of(path) != shard.sha256:
        raise UsageError(f"The shard {path} has been damaged: its SHA-256 is not the manifest's.")


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
