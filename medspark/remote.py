"""Addresses of object stores as paths, and copies of what lies there for readers that map files.

A setting that names a folder takes a path or an address (s3://bucket/folder). An address stays one
on its way to the machines that read: each of them copies the files to its own cache, once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Annotated, Self

from pydantic import PlainSerializer, PlainValidator

from medspark import ownership, storage
from medspark.errors import RunError, UsageError
from medspark.files import replacing, sha256_of

__all__ = ["AnyPath", "RemoteFile", "RemotePath", "any_path", "cache_folder", "copied", "is_remote"]

_LOGGER = logging.getLogger(__name__)

# Path writes s3://bucket as s3:/bucket.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/]|$)")
_AT_ONCE = 8  # files that are copied at the same time


class RemotePath(PosixPath):
    """An address as a path: it is printed with its scheme, joined as a path, and never local."""

    def __str__(self) -> str:
        return _ADDRESS.sub(r"\1://", super().__str__(), count=1)

    def __fspath__(self) -> str:
        return str(self)

    def resolve(self, strict: bool = False) -> Self:  # noqa: ARG002 - pathlib's
        """Return the address itself."""
        return self

    def absolute(self) -> Self:
        """Return the address itself."""
        return self

    def is_dir(self) -> bool:
        """Return whether files lie below the address."""
        return storage.is_folder(str(self))

    def is_file(self) -> bool:
        """Return whether a file has the address."""
        return storage.is_file(str(self))


def any_path(place: str | Path) -> Path:
    """Return ``place`` as a path of this machine, or as a RemotePath if it is an address."""
    text = os.fspath(place)
    if text.startswith(("file:/", "dbfs:/")):  # these have paths on this machine
        return Path(storage.normalise(text))
    return RemotePath(text) if _ADDRESS.match(text) else Path(text)


def _validated(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("this is no path")
    return any_path(value)


# The type of a setting that takes a path or an address.
AnyPath = Annotated[Path, PlainValidator(_validated), PlainSerializer(str, when_used="json")]


def is_remote(place: str | Path) -> bool:
    """Return whether ``place`` is an address."""
    return isinstance(any_path(place), RemotePath)


def cache_folder() -> Path:
    """Return the default folder for copies: medspark below XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medspark"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to copy: its path below the address, its bytes, and its SHA-256 if that is known."""

    path: str
    bytes: int
    sha256: str | None = None


def copied(url: str, files: Sequence[RemoteFile], cache: Path | None, *, name: str) -> Path:
    """Return the folder ``name`` of the cache, with whole copies of the ``files`` below ``url``.

    Processes of one machine share it: one copies, the others wait. A file of the right size is not
    copied again. Raises UsageError if the cache is not ours or has too little room, and RunError
    for a file whose SHA-256 is wrong.
    """
    if cache is None:
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    ownership.claim(cache, "shard cache")
    place = cache / name
    if not _missing(place, files):
        return place
    place.mkdir(exist_ok=True)
    with _alone(cache / f".{name}.lock"):
        if missing := _missing(place, files):
            total = sum(file.bytes for file in missing)
            _LOGGER.info(
                "copying %d files of %s (%.1f MB) to %s", len(missing), url, total / 1e6, place
            )
            if total > shutil.disk_usage(place).free:
                raise UsageError(
                    f"{url} has {total / 1e6:.0f} MB to copy, and {cache} has no room for them: "
                    "name another folder with data.cache_dir or XDG_CACHE_HOME."
                )
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda file: _copy(url, file, place), missing))
    return place


def _missing(place: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    def is_there(file: RemoteFile) -> bool:
        path = place / file.path
        return path.is_file() and path.stat().st_size == file.bytes

    return [file for file in files if not is_there(file)]


def _copy(url: str, file: RemoteFile, place: Path) -> None:
    address, target = storage.join(url, file.path), place / file.path
    system, path = storage.filesystem(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as draft:
        try:
            system.get_file(path, str(draft))
        except FileNotFoundError:
            raise RunError(f"{address} is missing.") from None
        if file.sha256 is not None and sha256_of(draft) != file.sha256:
            raise RunError(f"{address} has been damaged: its SHA-256 is not the manifest's.")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for other processes of this machine. Without locks each copies, which is harmless."""
    with open(lock, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _LOGGER.debug("%s has no locks: %s", lock, error)
        yield
