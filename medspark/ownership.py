"""Folder ownership: medspark writes to its own folders only, and removes only its own files.

A folder is medspark's if it carries the marker file. Folders made before the marker existed are
recognised by the manifest, model card or run record in them. An empty folder belongs to nobody yet.
Every job calls ``check`` before it starts. Only files whose names medspark generates are removed;
all other files stay.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fsspec.implementations.local import LocalFileSystem

from medspark import __version__
from medspark.errors import UsageError
from medspark.storage import filesystem

__all__ = ["MARKER", "Kind", "apart", "check", "claim", "remove"]

MARKER = ".medspark.json"

Kind = Literal[
    "samples", "shards", "run", "evaluation", "study", "exports", "detections", "guard",
    "predictions", "demo data", "shard cache", "phantom archive",
]  # fmt: skip

# Keys that medspark's own documents always have.
_SAMPLES = {"generation", "digest", "rendering", "key_check", "parts", "ledger", "quarantine"}
_SHARDS = {"generation", "digest", "classes", "height", "width", "splits", "leak_check", "source"}
_RUN = {"entry", "uri", "experiment", "published"}
_CARD = {"architecture", "classes", "channels", "height", "width", "mean", "std"}
# The files by which a folder without a marker is recognised as ours; * stands for any name.
_EVIDENCE: Mapping[Kind, Mapping[str, set[str]]] = {
    "samples": {"manifest.json": _SAMPLES},
    "shards": {"manifest.json": _SHARDS},
    "run": {"run.json": _RUN, "plain/run.json": _RUN, "model/model.json": _CARD},
    "evaluation": {"*/mlflow/run.json": _RUN},
    "study": {"sweep/run.json": _RUN, "mlflow/run.json": _RUN},
    "exports": {},
    "detections": {},
    "guard": {},
    "predictions": {},
    "demo data": {"samples/manifest.json": _SAMPLES},
    "shard cache": {"*/manifest.json": _SHARDS},
    "phantom archive": {},
}
_Pattern = tuple[re.Pattern[str], ...]
_SCRATCH = re.compile(re.escape(MARKER) + r"\.[0-9a-f]{8}\.partial")


def check(folder: str | Path, kind: Kind) -> None:
    """Raise UsageError, in one sentence, unless ``folder`` is ours and of ``kind``, or empty.

    ``folder`` is a path or an fsspec URL and need not exist. Nothing is written.
    """
    _is_marked(*filesystem(folder), kind)


def claim(folder: str | Path, kind: Kind) -> None:
    """Make ``folder`` one of ``kind`` that carries our marker. Raises UsageError as ``check``."""
    system, path = filesystem(folder)
    if _is_marked(system, path, kind):
        return
    record = {"kind": kind, "medspark": __version__, "made": datetime.now(UTC).isoformat()}
    text = json.dumps(record).encode()
    try:
        system.makedirs(path, exist_ok=True)
        if not isinstance(system, LocalFileSystem):
            system.pipe_file(f"{path}/{MARKER}", text)
            return
        scratch = Path(path, f"{MARKER}.{secrets.token_hex(4)}.partial")
        scratch.write_bytes(text)
        scratch.replace(Path(path, MARKER))
    except OSError as error:
        raise UsageError(f"{path} cannot be written to: {error.strerror or error}.") from None


def apart(sources: Mapping[str, str | Path | None], targets: Mapping[str, str | Path]) -> None:
    """Raise UsageError if a source lies inside a target, or a target inside a source.

    The keys are the names that the error sentence uses. Symbolic links are followed, and a folder
    mounted in two places counts as one.
    """
    for read, source in sources.items():
        for written, target in targets.items():
            if source is None:
                continue
            if _within(target, source):
                raise UsageError(
                    f"{written} ({target}) should not lie inside {read} ({source}), which is only "
                    "read: give another folder."
                )
            if _within(source, target):
                raise UsageError(
                    f"{read} ({source}) should not lie inside {written} ({target}), which is "
                    "written to: give another folder."
                )


def remove(folder: str | Path, names: Iterable[str], *, keep: Collection[str] = ()) -> None:
    """Remove the files below ``folder`` that match ``names``, and the folders that this empties.

    A name is a path relative to ``folder`` whose parts are regular expressions; a name that ends
    with ``/`` matches a whole tree. ``keep`` holds relative paths that stay. A symbolic link that
    matches is removed itself; links are never followed.
    """
    system, path = filesystem(folder)
    with suppress(FileNotFoundError):
        kept = {f"{path}/{name}" for name in keep}
        _prune(system, path, [tuple(map(re.compile, name.split("/"))) for name in names], kept)


# --- the decision ---


def _is_marked(system: Any, path: str, kind: Kind) -> bool:
    """Return whether the folder carries our marker. Raises UsageError where it is not ours."""
    place = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    try:
        if system.exists(path) and not system.isdir(path):
            raise UsageError(f"{place} is a file; medspark needs a folder for its {kind}.")
        # Read the marker last: meanwhile another process may claim the folder and begin to write.
        foreign = next(_files(system, path), None)
        theirs = _read(system, f"{path}/{MARKER}").get("kind")
        if theirs == kind:
            return True
        if theirs is not None:
            raise UsageError(f"{place} holds medspark's {theirs}, not {kind}: give another folder.")
        if foreign is not None and not _is_known(system, path, kind):
            raise UsageError(
                f"{place} is not empty and not medspark's ({foreign} is in it): give a folder of "
                f"its own for the {kind}."
            )
        return False
    except OSError as error:
        raise UsageError(f"{place} cannot be looked into: {error.strerror or error}.") from None


def _is_known(system: Any, path: str, kind: Kind) -> bool:
    """Return whether one of our documents is where an earlier version wrote it."""
    for name, keys in _EVIDENCE[kind].items():
        first, _, rest = name.partition("/")
        places = _names(system, path) if first == "*" else [first]
        for place in places:
            document = _read(system, "/".join(filter(None, (path, place, rest))))
            if keys <= document.keys():
                return True
    return False


def _within(inner: str | Path, outer: str | Path) -> bool:
    (system, inside), (other, outside) = filesystem(inner), filesystem(outer)
    if not (isinstance(system, LocalFileSystem) and isinstance(other, LocalFileSystem)):
        same = system.protocol == other.protocol
        return same and f"{inside.rstrip('/')}/".startswith(f"{outside.rstrip('/')}/")
    below, above = Path(os.path.realpath(inside)), Path(os.path.realpath(outside))
    return any(place == above or _same(place, above) for place in (below, *below.parents))


def _same(place: Path, other: Path) -> bool:
    with suppress(OSError):
        return place.samefile(other)
    return False


# --- reading a folder, local or in an object store ---


def _files(system: Any, path: str) -> Iterator[str]:
    """Yield the names of files below a folder. Folders do not count: a mount point is one."""
    if not isinstance(system, LocalFileSystem):
        for place, _, names in system.walk(path):
            yield from (f"{place}/{name}"[len(path) + 1 :] for name in names)
        return
    for place, folders, names in os.walk(path, onerror=_unreadable):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*names, *links):
            if not _SCRATCH.fullmatch(name):
                yield os.path.relpath(Path(place, name), path)


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _names(system: Any, path: str) -> list[str]:
    return [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in _entries(system, path)]


def _entries(system: Any, path: str) -> list[dict[str, Any]]:
    system.invalidate_cache(path)
    return [entry for entry in system.ls(path, detail=True) if entry["name"].rstrip("/") != path]


def _read(system: Any, path: str) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file holds none."""
    try:
        document = json.loads(system.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _prune(system: Any, path: str, patterns: list[_Pattern], kept: Collection[str]) -> None:
    for entry in _entries(system, path):
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        place, below = f"{path}/{name}", [p[1:] for p in patterns if p[0].fullmatch(name)]
        if not _is_real_folder(system, entry):
            if () in below and place not in kept:
                with suppress(FileNotFoundError):
                    system.rm_file(place)
        elif any(rest and rest[0].pattern == "" for rest in below):
            system.rm(place, recursive=True)
        elif any(below):
            _prune(system, place, [rest for rest in below if rest], kept)
            with suppress(OSError):  # files of others are in it
                system.rmdir(place)


def _is_real_folder(system: Any, entry: Mapping[str, Any]) -> bool:
    if isinstance(system, LocalFileSystem):
        with suppress(FileNotFoundError):
            return stat.S_ISDIR(os.lstat(entry["name"]).st_mode)
        return False
    return bool(entry["type"] == "directory")
