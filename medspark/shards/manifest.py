"""Read, write and verify the manifest of a shard folder, which names all files of the dataset.

Files that the manifest does not name are not read. A named file must have the size and SHA-256 that
the manifest gives. Parquet readers alone do not notice a missing, duplicate or bit-flipped file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from medspark.documents import parse_json, read_regular
from medspark.errors import UsageError
from medspark.files import sha256_of, write_whole
from medspark.shards.schema import MOST_FINDINGS, PixelFormat, findings_of, read_patients

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


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Make ``manifest`` the content of ``folder``, atomically."""
    write_whole(Path(folder) / NAME, manifest.model_dump_json(indent=1), durable=True)


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of ``folder``. Raises UsageError if it is not a folder of shards."""
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


def patients_of(folder: Path, manifest: Manifest, split: str) -> npt.NDArray[np.str_]:
    """Return the patient key of every image of a split, (N,), in the order of its rows."""
    shards = manifest.splits[split].shards
    keys = [read_patients(folder / shard.path) for shard in shards]
    return np.concatenate([np.empty(0, dtype=np.str_), *keys])


def verify(folder: str | Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Check that every file exists, has its size and, with ``contents``, its SHA-256.

    An unnamed file among the shards is an error too: medspark would skip it, but other Parquet
    readers would read it as data. Raises UsageError that names the first bad file.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
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


def _verify_file(path: Path, shard: Shard, *, contents: bool) -> None:
    if not path.is_file():
        raise UsageError(f"The shard {path} is missing; write the shards again.")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UsageError(f"The shard {path} has {size} bytes instead of {shard.bytes}.")
    if contents and sha256_of(path) != shard.sha256:
        raise UsageError(f"The shard {path} has been damaged: its SHA-256 is not the manifest's.")
