"""The files of a federation, in one folder that all workers share.

    settings.json                 the digest of what decides the weights
    clients.npz                   the rows of each client
    edge.npz                      tail images, if an attack has them
    start/weights-00000.npy       the first weights, in parts; so are all vectors
    round-00003/                  a round: plan.json, and result.json once it is finished
        weights-00001.npy         the weights after the round; change-, state-, control- likewise
        update-000034.npy         what a client sent, for rules that need every update
        sum-00001.npy             the exact sum of what the clients of one task sent
        left-out/34.json          why a client is left out
        figures.json              the validation after the round
    memory/000034-00003.npz       what a client keeps private, as of a round that counted it

A vector is written in parts by the workers that computed them, each part whole. ``result.json`` is
written last. Files of earlier rounds that nobody needs any more are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medspark.files import replacing, write_whole

__all__ = ["FEDERATION_FILES", "FederationFolder", "Overwriting", "write_array"]

Floats = npt.NDArray[Any]

_DRAFT = r"(\.[0-9a-f]{8}\.partial)?"
# The names of all files that a federation writes below its folder. No other file is removed.
FEDERATION_FILES = (
    rf"\.?(clients|edge)\.npz{_DRAFT}",
    rf"\.?settings\.json{_DRAFT}",
    rf"(start|round-\d{{5}})/\.?(weights|change|state[a-z0-9]*|control)-\d{{5}}\.npy{_DRAFT}",
    rf"round-\d{{5}}/\.?(update|history|pattern)-(root|\d{{6}})(-\d{{5}})?\.npy{_DRAFT}",
    rf"round-\d{{5}}/\.?(sum|controls)-\d{{5}}\.npy{_DRAFT}",
    rf"round-\d{{5}}/\.?(plan|result|figures)\.json{_DRAFT}",
    r"round-\d{5}/progress-\d{5}\.txt",
    rf"round-\d{{5}}/left-out/\.?-?\d+\.json{_DRAFT}",
    r"round-\d{5}/(model|pieces)/",
    r"pieces/",
    rf"report/\.?(report\.(md|html)|rounds\.(png|csv)){_DRAFT}",
    rf"memory/\.?\d{{6}}-\d{{5}}\.npz{_DRAFT}",
    rf"tasks/\.?(step|answer)-\d{{8}}(-\d{{5}})?\.json{_DRAFT}",
    rf"tasks/[0-9a-f]{{8}}/\.?(step|answer)-\d{{8}}(-\d{{5}})?\.json{_DRAFT}",
)


@dataclass(frozen=True)
class FederationFolder:
    """The folder of one federation."""

    path: Path

    def round(self, number: int) -> Path:
        """Return the folder of a round; of the start for -1."""
        return self.path / ("start" if number < 0 else f"round-{number:05d}")

    def read(self, number: int, name: str, here: slice | None = None) -> Floats:
        """Return the vector ``name`` (d,) after round ``number``, joined from its parts.

        Of its coordinates only those ``here`` are read, all by default.
        """
        paths = self._parts(number, name)
        mode: Literal["r"] | None = None if here is None and len(paths) == 1 else "r"
        parts = [np.load(path, mmap_mode=mode) for path in paths]
        if here is not None:
            starts = np.cumsum([0, *(len(part) for part in parts)])
            parts = [
                part[max(0, here.start - start) : max(0, here.stop - start)]
                for part, start in zip(parts, starts, strict=False)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def has(self, number: int, name: str) -> bool:
        """Return whether the vector ``name`` of round ``number`` exists."""
        return bool(self._parts(number, name))

    def write(self, number: int, name: str, part: int, values: Floats) -> None:
        """Write one part of the vector ``name`` of round ``number``."""
        write_array(self.round(number) / f"{name}-{part:05d}.npy", values)

    def names(self, number: int, prefix: str) -> list[str]:
        """Return the sorted names of the vectors of a round that begin with ``prefix``."""
        found = self.round(number).glob(f"{prefix}*-00000.npy")
        return sorted(path.name.rsplit("-", 1)[0] for path in found)

    def update(self, number: int, client: int) -> Path:
        """Return the file of what ``client`` sent in round ``number``; the server's own is -1."""
        name = "root" if client < 0 else f"{client:06d}"
        return self.round(number) / f"update-{name}.npy"

    def pattern(self, number: int, client: int) -> Path:
        """Return the file of the trigger that ``client`` prepared in round ``number``."""
        return self.round(number) / f"pattern-{client:06d}.npy"

    def newest_pattern(self, number: int) -> Path | None:
        """Return the file of the newest trigger that was prepared in round ``number`` or before.

        Of several clients' triggers it is the one of the smallest number.
        """
        for earlier in range(number, -1, -1):
            files = sorted(self.round(earlier).glob("pattern-*.npy"))
            if files:
                return files[0]
        return None

    def forget_patterns(self, number: int) -> None:
        """Remove all triggers but the newest one as of round ``number``."""
        newest = self.newest_pattern(number)
        for path in self.path.glob("round-*/pattern-*.npy"):
            if path != newest:
                path.unlink(missing_ok=True)

    @property
    def edge(self) -> Path:
        """The file of the tail images that clients may hold."""
        return self.path / "edge.npz"

    def memory(self, client: int, number: int) -> Path:
        """Return the file of what ``client`` keeps private as of round ``number``."""
        return self.path / "memory" / f"{client:06d}-{number:05d}.npz"

    def leave_out(self, number: int, client: int, reason: str) -> None:
        """Record that ``client`` is left out of round ``number``; a resumed run keeps to it."""
        file = self.round(number) / "left-out" / f"{client}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"reason": reason}))

    def left_out(self, number: int) -> dict[int, str]:
        """Return the clients that are left out of round ``number``, each with the reason.

        The server's own training counts as client -1.
        """
        files = (self.round(number) / "left-out").glob("*.json")
        found = {int(file.stem): json.loads(file.read_text())["reason"] for file in files}
        return dict(sorted(found.items()))

    def finished(self) -> int:
        """Return how many rounds are finished."""
        number = 0
        while (self.round(number) / "result.json").exists():
            number += 1
        return number

    def clear(self, number: int) -> None:
        """Remove what an interrupted attempt at a round left, but for who is left out.

        The next attempt may divide clients and coordinates into other parts, so that parts of both
        would be joined. And clients that were trained when the driver ended did not end it.
        """
        for pattern in ("*.npy", "progress-*.txt"):
            for path in self.round(number).glob(pattern):
                path.unlink(missing_ok=True)

    def forget_validation(self, number: int) -> None:
        """Remove the network and the answers of a round's validation, whose figures are kept."""
        for name in ("model", "pieces"):
            shutil.rmtree(self.round(number) / name, ignore_errors=True)

    def forget(self, number: int, prefixes: Iterable[str]) -> None:
        """Remove the vectors of a round whose names begin with one of ``prefixes``."""
        for prefix in prefixes:
            for path in self.round(number).glob(f"{prefix}-*.npy"):
                path.unlink(missing_ok=True)

    def _parts(self, number: int, name: str) -> list[Path]:
        return sorted(self.round(number).glob(f"{name}-*.npy"))


class Overwriting:
    """Writes arrays of one name in round after round, each over the file of the round before.

    Nobody needs that file any more. Writing new files of 38 MB stalled at times in a virtual
    machine, 80 to 250 ms in place of 8; overwriting them did not.
    """

    def __init__(self) -> None:
        self._last: dict[str, Path] = {}

    def write(self, path: Path, values: Floats) -> None:
        """Write an array to ``path``, atomically; the last file of that name may be gone then."""
        write_array(path, values, over=self._last.get(path.name))
        self._last[path.name] = path


def write_array(path: Path, values: Floats, *, over: Path | None = None) -> None:
    """Write an array to ``path``, atomically, in place of ``over`` if that file exists."""
    with replacing(path) as draft:
        if over is not None:
            with suppress(FileNotFoundError):
                over.replace(draft)
        with draft.open("r+b" if draft.exists() else "wb") as file:
            np.save(file, values, allow_pickle=False)
            file.truncate()
