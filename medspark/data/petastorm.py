"""The Petastorm reader, on the same shard files as the native reader.

It shuffles files and a window of rows, not the whole split, so only the order of the images differs
from the native reader's. It uses one reader thread, because with several, Petastorm's order differs
from run to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from medspark.data.augment import augment
from medspark.data.batch import Batch, Integers, Pixels, batch_of
from medspark.data.config import AugmentConfig
from medspark.data.petastorm_import import import_petastorm
from medspark.errors import UsageError
from medspark.seeding import derive, hash64
from medspark.shards.manifest import Manifest
from medspark.shards.plan import EpochPlan, permute, share
from medspark.shards.schema import PixelFormat

__all__ = ["PetastormReader", "refuse_pickles"]

# Images (N, H, W, C), labels as stored (N,), dataset rows (N,).
Chunk = tuple[Pixels, Integers, Integers]


class PetastormReader:
    """Training batches of one rank, read by Petastorm.

    Each epoch concatenates the files in a keyed order. A rank reads its contiguous share of this
    stream through a window of rows, so that every row is used exactly once per epoch.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        world: int,
        window: int,
        augmentation: AugmentConfig | None,
    ) -> None:
        """Raises UsageError if Petastorm is missing or would unpickle parts of the files."""
        self._petastorm = import_petastorm()
        shards = manifest.splits[split].shards
        self._paths = [folder / shard.path for shard in shards]
        self._rows = [shard.rows for shard in shards]
        refuse_pickles(folder, self._paths)
        self._format, self._targets = manifest.pixel_format, manifest.targets
        self._plan = EpochPlan(sum(self._rows), global_batch, seed)
        self._seed = seed
        self._rank, self._world = rank, world
        self._window = window
        self._augmentation = augmentation

    @property
    def steps(self) -> int:
        """The number of batches in an epoch, the same on every rank and for the native reader."""
        return self._plan.steps

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on; earlier ones are read too."""
        size = max(self._window, self._plan.global_batch)
        stream = _Window(self._chunks(epoch), size, self._format)
        for step in range(self._plan.steps):
            size = self._plan.batch_size(step)
            first, last = share(size, self._world, self._rank)
            key = derive(self._seed, "window", epoch, step)
            images, labels, rows = stream.take(last - first, key)
            if step < start:
                continue
            if self._augmentation is not None:
                images = augment(
                    images, rows, config=self._augmentation, seed=self._seed, epoch=epoch
                )
            yield batch_of(
                images,
                self._targets(labels),
                rows,
                weight=self._plan.weight(step, self._rank, self._world),
                global_size=size,
                epoch=epoch,
                step=step,
            )

    def _chunks(self, epoch: int) -> Iterator[Chunk]:
        """Yield images, labels and rows of this rank's part of the epoch's stream of files."""
        begin, end = self._my_part()
        starts = np.cumsum([0, *self._rows])
        order = permute(
            range(len(self._paths)), len(self._paths), derive(self._seed, "files", epoch)
        )
        position = 0
        for number in order:
            stop = position + self._rows[number]
            if position < end and stop > begin:
                skip, keep = max(begin - position, 0), min(end, stop) - position
                for images, labels, place in self._read(self._paths[number]):
                    mine = (place >= skip) & (place < keep)
                    yield images[mine], labels[mine], starts[number] + place[mine]
            position = stop

    def _my_part(self) -> tuple[int, int]:
        """Return the first row of this rank's part of the stream, and the row after its last."""
        sizes = [self._plan.batch_size(step) for step in range(self._plan.steps)]
        bounds = np.array(
            [[share(size, self._world, rank) for size in sizes] for rank in range(self._world)]
        )
        ends = np.cumsum((bounds[:, :, 1] - bounds[:, :, 0]).sum(axis=1))
        return int(ends[self._rank - 1]) if self._rank else 0, int(ends[self._rank])

    def _read(self, path: Path) -> Iterator[Chunk]:
        """Yield images, labels and positions in the file, one row group at a time."""
        place = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = self._petastorm.make_batch_reader(
                path.resolve().as_uri(),
                schema_fields=["label", "pixels"],
                reader_pool_type="dummy",
                shuffle_row_groups=False,
                num_epochs=1,
            )
            with reader:
                for group in reader:
                    count = len(group.label)
                    flat = np.frombuffer(b"".join(group.pixels), dtype=self._format.dtype)
                    images = flat.reshape(count, *self._format.shape)
                    yield images, group.label.astype(np.int64), np.arange(place, place + count)
                    place += count


class _Window:
    """Draws rows in keyed random order from the next ``size`` rows of a stream.

    The window holds stored integers, and only drawn rows are copied. Shuffling float images, as
    Petastorm's queue does, takes more than five times as long as reading them.
    """

    def __init__(self, chunks: Iterator[Chunk], size: int, pixel_format: PixelFormat) -> None:
        self._chunks = chunks
        self._images = np.empty((size, *pixel_format.shape), dtype=pixel_format.dtype)
        self._labels = np.empty(size, dtype=np.int64)
        self._rows = np.empty(size, dtype=np.int64)
        self._filled = 0
        self._pending: Chunk = (self._images[:0], self._labels[:0], self._rows[:0])

    def take(self, count: int, key: int) -> Chunk:
        """Remove ``count`` rows, drawn by ``key``, and return their images, labels and rows."""
        self._fill()
        # Hashes of the row numbers decide, so the draw does not depend on positions in the window.
        drawn = np.argsort(hash64(key, self._rows[: self._filled]), kind="stable")[:count]
        chosen = self._images[drawn], self._labels[drawn], self._rows[drawn]
        left = self._filled - len(drawn)
        holes = drawn[drawn < left]
        movers = np.setdiff1d(np.arange(left, self._filled), drawn)
        for column in (self._images, self._labels, self._rows):
            column[holes] = column[movers]
        self._filled = left
        return chosen

    def _fill(self) -> None:
        while (room := len(self._rows) - self._filled) > 0:
            if len(self._pending[2]) == 0:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._pending = chunk
                continue
            images, labels, rows = self._pending
            count = min(room, len(rows))
            target = slice(self._filled, self._filled + count)
            self._images[target] = images[:count]
            self._labels[target] = labels[:count]
            self._rows[target] = rows[:count]
            self._pending = images[count:], labels[count:], rows[count:]
            self._filled += count


def refuse_pickles(folder: Path, paths: list[Path]) -> None:
    """Raise UsageError if Petastorm would unpickle data when it opens the files at ``paths``.

    Petastorm unpickles a schema from ``_common_metadata`` and from the key-value metadata of any
    Parquet file, and its list of permitted names includes ``builtins.eval``.
    """
    for parent in {folder, *(path.parent for path in paths)}:
        for name in ("_common_metadata", "_metadata"):
            if (parent / name).exists():
                raise UsageError(
                    f"{parent / name} could make Petastorm run code from the dataset; remove it, "
                    "or use data.reader native."
                )
    for path in paths:
        keys = pq.read_schema(path).metadata or {}
        if any(key.startswith(b"dataset-toolkit.") for key in keys):
            raise UsageError(
                f"{path} carries a pickled Petastorm schema, which could run code; use data.reader "
                "native."
            )
