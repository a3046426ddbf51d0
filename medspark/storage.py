"""Access files by path or URL: local folders, S3, and the other schemes of fsspec (abfs, hdfs).

Spark and fsspec name the same place differently. ``normalise`` returns fsspec's name, and
``for_spark`` returns Spark's.

Writers of one document keep each other's changes by its version: ``read_version``, then
``write_if``. Only object stores have versions. Elsewhere a kernel lock keeps other writers away.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from medspark.errors import RunError, UsageError
from medspark.files import replacing
from medspark.object_store import ObjectStore

# The size that is given for a link that leads out of the source.
OUTSIDE = -2

# fsspec's names of schemes, by Hadoop's.
_SCHEMES = {"s3a": "s3", "s3n": "s3", "gs": "gcs"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder in a folder. ``modified`` is in nanoseconds since 1970, 0 if unknown.

    ``size`` is in bytes, -1 if it cannot be read, OUTSIDE for a link out of the source.
    """

    path: str
    is_folder: bool
    size: int = 0
    modified: int = 0


def normalise(url: str | Path) -> str:
    """Return ``url`` in fsspec's form: absolute, no trailing slash, a plain path if local."""
    url = os.fspath(url)
    if url.startswith("dbfs:/"):
        url = "/dbfs/" + url.removeprefix("dbfs:").lstrip("/")
    if url.startswith("file:"):
        url = "/" + url.removeprefix("file:").lstrip("/")
    scheme, separator, rest = url.partition("://")
    if separator:
        return f"{_SCHEMES.get(scheme, scheme)}://{rest.rstrip('/')}"
    return os.path.abspath(url)


def for_spark(url: str) -> str:
    """Return ``url`` in the form of Spark's readers: a local path starts with file://."""
    scheme, separator, rest = normalise(url).partition("://")
    if not separator:
        return f"file://{scheme}"  # not escaped: Hadoop does not decode %20
    hadoop = {"s3": "s3a", "gcs": "gs"}
    return f"{hadoop.get(scheme, scheme)}://{rest}"


def join(folder: str, path: str) -> str:
    """Return ``path``, which is relative to ``folder``, joined to it."""
    return f"{folder.rstrip('/')}/{path}"


def filesystem(url: str | Path) -> tuple[Any, str]:
    """Return fsspec's filesystem for ``url`` and the path inside it.

    Raises UsageError for a scheme without a driver. The message names the missing package if
    fsspec knows it.
    """
    url = normalise(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        return fsspec.filesystem("file"), url  # as it is: ~ and :: are names too
    if scheme == "s3":
        return ObjectStore(), rest
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url} cannot be reached: {error}") from None


def is_local(url: str | Path) -> bool:
    """Return whether ``url`` is a path of this machine's file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def is_object_store(url: str | Path) -> bool:
    """Return whether ``url`` is in an object store: Spark has no driver for it, we have."""
    return isinstance(filesystem(url)[0], ObjectStore)


def is_folder(url: str) -> bool:
    """Return whether ``url`` is a folder that exists."""
    system, path = filesystem(url)
    return bool(system.isdir(path))


def is_file(url: str) -> bool:
    """Return whether ``url`` is a file that exists."""
    system, path = filesystem(url)
    return bool(system.isfile(path))


def read_text(url: str) -> str | None:
    """Return the content of a small UTF-8 file, or None if it does not exist."""
    system, path = filesystem(url)
    try:
        return str(system.cat_file(path).decode("utf-8"))
    except FileNotFoundError:
        return None


def write_text(url: str, text: str) -> None:
    """Write a small file atomically: readers find the old content or the new one."""
    write_bytes(url, text.encode())


def write_bytes(url: str, content: bytes) -> None:
    """Write a small file atomically: readers find the old content or the new one."""
    system, path = filesystem(url)
    if not isinstance(system, LocalFileSystem):
        system.pipe_file(path, content)  # an object store shows only complete puts
        return
    with replacing(Path(path), durable=True) as draft:
        draft.write_bytes(content)


def read_version(url: str) -> tuple[bytes, str | None]:
    """Return a small file and its version. Raises FileNotFoundError.

    The version is None where files have none.
    """
    system, path = filesystem(url)
    if isinstance(system, ObjectStore):
        return system.read_version(path)
    system.invalidate_cache(path.rpartition("/")[0])
    return bytes(system.cat_file(path)), None


def write_if(url: str, content: bytes, version: str | None) -> tuple[bool, str | None]:
    """Write a small file, whole, if it still has ``version``; None means that it is not there.

    Returns whether it was written, and its new version. Where files have no versions, it is written
    in any case.
    """
    system, path = filesystem(url)
    if not isinstance(system, ObjectStore):
        write_bytes(url, content)
        return True, None
    written = system.put_if(path, content, version)
    return written is not None, written


def commit(url: str, text: str, version: str | None) -> str | None:
    """Replace the document ``url``, which was read as ``version``; return its new version.

    Raises RunError if another process has replaced it meanwhile.
    """
    done, written = write_if(url, text.encode(), version)
    if not done:
        raise RunError(
            f"Another job changed {url} while this one worked, so nothing was committed: give the "
            "same command again."
        )
    return written


@contextmanager
def draft_of(url: str) -> Iterator[Path]:
    """Yield the path of a local draft that becomes the file ``url`` if the block succeeds."""
    system, path = filesystem(url)
    if isinstance(system, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, path.rpartition("/")[2])
        yield draft
        system.put_file(str(draft), path)


def remove_file(url: str) -> None:
    """Remove a file, if it is there."""
    system, path = filesystem(url)
    with suppress(FileNotFoundError):
        system.rm_file(path)


def make_folder(url: str) -> None:
    """Create the folder ``url`` and its parents. Raises UsageError if that fails."""
    system, path = filesystem(url)
    try:
        system.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot create the folder {url}: {error.strerror or error}.") from None


def is_inside(source: str, path: str) -> bool:
    """Return whether ``path``, relative to ``source``, stays inside it after resolving links.

    Only local folders have links.
    """
    if "://" in source and not is_local(source):
        return True
    place = source
    # Resolve only paths with links: resolving costs more than the rest of opening a file.
    for name in path.split("/"):
        place = join(place, name)
        if name == os.pardir or os.path.islink(place):
            return _is_below(os.path.realpath(join(source, path)), os.path.realpath(source))
    return True


def children(url: str, *, inside: str | None = None) -> Iterator[Entry]:
    """Yield the entries of a folder, in no particular order and without its subfolders' entries.

    ``inside`` is the source that the folder belongs to. With it, a link that leads out of the
    source is a file of size OUTSIDE, and its target is not read.
    """
    system, path = filesystem(url)
    if isinstance(system, LocalFileSystem):
        yield from _scan(path, os.path.realpath(inside) if inside else None)
        return
    for info in system.ls(path, detail=True):
        name = info["name"].rstrip("/")[len(path.rstrip("/")) + 1 :]
        if name:  # object stores may list the folder itself
            kind, size = info["type"], int(info.get("size") or 0)
            yield Entry(join(url, name), kind == "directory", size, _modified(info))


def _scan(folder: str, inside: str | None) -> Iterator[Entry]:
    # A generator, since a folder may hold ten million files.
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if inside and entry.is_symlink() and _leaves(entry.path, inside):
                    changed = entry.stat(follow_symlinks=False).st_mtime_ns
                    yield Entry(entry.path, False, OUTSIDE, changed)
                elif not entry.is_dir():
                    yield _file(entry)
                elif not (entry.is_symlink() and _is_loop(entry.path)):
                    yield Entry(entry.path, is_folder=True)
            except OSError:
                yield Entry(entry.path, is_folder=False, size=-1)  # for example a dangling link


def _file(entry: os.DirEntry[str]) -> Entry:
    status = entry.stat()
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Entry(entry.path, False, size, status.st_mtime_ns)


def _leaves(link: str, inside: str) -> bool:
    target = os.path.realpath(link)
    return os.path.lexists(target) and not _is_below(target, inside)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _is_loop(link: str) -> bool:
    """Return whether ``link`` leads to one of its own parent folders."""
    target, folder = os.path.realpath(link), os.path.dirname(link)
    while not _is_below(os.path.realpath(folder), target):
        if folder == os.path.dirname(folder):
            return False
        folder = os.path.dirname(folder)
    return True


def _modified(info: dict[str, Any]) -> int:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, int | float):
            return int(value * 1e9)
    return 0
