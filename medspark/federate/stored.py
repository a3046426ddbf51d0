"""Read what a federation stored: the rows of clients, their updates, and their private memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medspark.federate.aggregate.exact import ExactSum
from medspark.federate.aggregate.measure import chunks
from medspark.federate.aggregate.rule import Matrix, Vector
from medspark.federate.client import Memory
from medspark.federate.edge import EdgeImages
from medspark.federate.folder import FederationFolder
from medspark.federate.weights import Weights
from medspark.files import replacing

__all__ = [
    "ROOT", "ClientRows", "StoredUpdates", "chunks_within", "read_control", "read_edge",
    "read_memory", "read_pattern", "write_edge", "write_memory",
]  # fmt: skip

# The number of the server's own client, which trains on validation images for FLTrust.
ROOT = -1


class ClientRows:
    """The rows of every client, stored as one array; reading them takes no copy.

    Who asks for no rows, as the driver, does not load them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with np.load(path, allow_pickle=False) as stored:
            self._starts = stored["starts"]

    @cached_property
    def _rows(self) -> Any:
        with np.load(self._path, allow_pickle=False) as stored:
            return stored["rows"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, client: int) -> Any:
        return self._rows[self._starts[client] : self._starts[client + 1]]

    @property
    def counts(self) -> Any:
        """The number of images (K,) of each client."""
        return np.diff(self._starts)


class StoredUpdates:
    """The updates of a round as rows in the order of the clients, a few coordinates at a time."""

    def __init__(
        self, folder: FederationFolder, step: dict[str, Any], references: Sequence[str]
    ) -> None:
        self._folder, self._step, self._names = folder, step, references
        self._number = int(step["round"])
        self._sums: dict[str, list[Any]] = {}
        self._files = [] if step["adds_up"] else [self._open(c) for c in step["counted"]]

    @cached_property
    def _base(self) -> Weights:
        base: Weights = self._folder.read(self._number - 1, "weights")
        return base

    def updates(self, here: slice) -> Matrix:
        base = self._base[here].astype(np.float64)
        return np.stack([file[here] - base for file in self._files])

    def measured(self, here: slice) -> Matrix:
        """Return the sums of all updates of each client, with this round's."""
        rows = self.updates(here)
        for row, client in zip(rows, self._step["counted"], strict=True):
            last = self._step["memory"].get(str(client))
            if last is not None:
                row += self._folder.read(int(last), f"history-{client:06d}", here)
        return rows

    def remember(self, bounds: tuple[int, int], part: int) -> None:
        """Store the sums of all updates of each client, with this round's."""
        for row, client in zip(self.measured(slice(*bounds)), self._step["counted"], strict=True):
            self._folder.write(self._number, f"history-{client:06d}", part, row)

    def references(self, here: slice) -> Matrix:
        """Return the reference vectors (r, c) that the rule names."""
        rows = [self._reference(name, here) for name in self._names]
        return np.array(rows, dtype=np.float64).reshape(len(rows), here.stop - here.start)

    def _reference(self, name: str, here: slice) -> Vector:
        base: Vector = self._base[here].astype(np.float64)
        if name == "weights":
            return base
        if name == "centre":
            return self._last_change(here)
        root: Vector = self._open(ROOT)[here] - base
        return root

    def _last_change(self, here: slice) -> Vector:
        if not self._folder.has(self._number - 1, "change"):
            return np.zeros(here.stop - here.start)
        return self._folder.read(self._number - 1, "change", here)

    def summed(self, name: str, here: slice, *, weight: float, over: float = 1.0) -> Vector:
        """Return the sum of all tasks' exact sums, divided by ``over``."""
        if name not in self._sums:
            place = self._folder.round(self._number)
            paths = [place / f"{name}-{part:05d}.npy" for part in range(self._step["trainers"])]
            self._sums[name] = [np.load(path, mmap_mode="r") for path in paths]
        whole = ExactSum(here.stop - here.start, weight=weight)
        for units in self._sums[name]:
            whole.units += units[here]
        total = whole.value()
        total /= over
        return total

    def _open(self, client: int) -> Weights:
        opened: Weights = np.load(self._folder.update(self._number, client), mmap_mode="r")
        return opened


def chunks_within(bounds: Sequence[int]) -> Iterator[slice]:
    """Yield the chunks between two bounds, which lie on bounds of chunks."""
    start, stop = bounds
    for here in chunks(stop - start):
        yield slice(here.start + start, here.stop + start)


def read_control(folder: FederationFolder, number: int) -> Vector | None:
    """Return SCAFFOLD's control variate (d,) of the server before a round, None in the first."""
    return folder.read(number - 1, "control") if folder.has(number - 1, "control") else None


def write_memory(path: Path, memory: Memory) -> None:
    """Write what a client keeps private, if it keeps anything."""
    kept = {"norms": memory.norms, "control": memory.control}
    arrays = {name: values for name, values in kept.items() if values is not None}
    if arrays:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)


def read_memory(path: Path) -> Memory:
    """Return what a client keeps private, from its file; empty if there is none."""
    if not path.exists():
        return Memory()
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Memory(arrays.get("norms"), arrays.get("control"))


def write_edge(path: Path, edge: EdgeImages) -> None:
    """Write tail images and their labels to one file."""
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, images=edge.images.numpy(), labels=edge.labels.numpy())


def read_edge(path: Path) -> EdgeImages | None:
    """Return the tail images in a file, or None if there is none."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return EdgeImages(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))


def read_pattern(folder: FederationFolder, number: int) -> torch.Tensor | None:
    """Return the newest trigger that was prepared in round ``number`` or before, if one was."""
    newest = folder.newest_pattern(number)
    return None if newest is None else torch.from_numpy(np.load(newest, allow_pickle=False))
