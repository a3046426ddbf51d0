"""The native reader: memory-mapped shards, shuffled by index, read without decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from medspark.data.augment import augment
from medspark.data.batch import Batch, Integers, Pixels, Targets, to_unit
from medspark.data.config import AugmentConfig
from medspark.errors import UsageError
from medspark.shards.local import local_shards
from medspark.shards.manifest import Manifest
from medspark.shards.plan import EpochPlan
from medspark.shards.schema import map_pixels, read_labels

__all__ = ["MappedSplit", "NativeReader"]

# Steps with fewer bytes of images in total are read together: for a step of thumbnails, the
# overhead of a read exceeds the time of the copy.
_READ_BYTES = 1 << 20

CPU = torch.device("cpu")


class MappedSplit:
    """The rows of one split, addressed by number; images are read on demand."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        """Map the files that ``manifest`` lists for ``split``, and read the labels."""
        self._format, self._targets = manifest.pixel_format, manifest.targets
        shards = manifest.splits[split].shards
        place = local_shards(folder)
        starts = np.cumsum([0, *(shard.rows for shard in shards)])
        # In few bytes, and not concatenated: there may be a hundred million.
        self._labels = np.empty(starts[-1], dtype=_label_type(manifest))

        def open_shard(number: int) -> list[Pixels]:
            path = place / shards[number].path
            metadata = pq.read_metadata(path)
            labels = read_labels(path, metadata)
            _check_labels(path, labels, self._labels.dtype)
            self._labels[starts[number] : starts[number + 1]] = labels
            return map_pixels(path, self._format, metadata)

        # Half of the time, Arrow works without Python's lock.
        with ThreadPoolExecutor(max_workers=2) as pool:
            opened = pool.map(open_shard, range(len(shards)))
            self._pixels = _Window([group for groups in opened for group in groups])
        self._rows: Integers | None = None

    def subset(self, rows: Integers) -> Self:
        """Return only ``rows`` of this split, renumbered from 0.

        Both share the mapped files, and no file is read: the cost is that of ``rows``.
        """
        part = copy(self)
        part._rows = rows if self._rows is None else self._rows[rows]
        part._labels = self._labels[rows]
        return part

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def image_bytes(self) -> int:
        """The size of one image in bytes."""
        return self._format.nbytes

    @property
    def labels(self) -> Targets:
        """The labels of all rows: classes (N,), or findings (N, K)."""
        return self._targets(self._labels.astype(np.int64))

    def tensors(self, rows: Integers, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, H, W) of ``rows`` as floats in [0, 1], and their labels."""
        images, labels = self.gather(rows)
        pixels = to_unit(torch.from_numpy(images).permute(0, 3, 1, 2), device)
        return pixels, torch.from_numpy(labels).to(device)

    def gather(self, rows: Integers) -> tuple[Pixels, Targets]:
        """Return a copy of the images (B, H, W, C) of ``rows``, and their labels."""
        stored = rows if self._rows is None else self._rows[rows]
        images = self._pixels.take(stored).view(self._format.dtype)
        labels = self._targets(self._labels[rows].astype(np.int64))
        return images.reshape(len(rows), *self._format.shape), labels


def _label_type(manifest: Manifest) -> np.dtype[Any]:
    """Return the type that holds a stored label of ``manifest``: a class, or a mask of findings."""
    return np.dtype(np.int32) if manifest.multi_label else np.min_scalar_type(len(manifest.classes))


def _check_labels(path: Path, labels: Integers, kind: np.dtype[Any]) -> None:
    """Raise UsageError if a label of a shard does not fit ``kind``."""
    if len(labels) and not 0 <= labels.min() <= labels.max() <= np.iinfo(kind).max:
        raise UsageError(f"{path} has labels that its manifest has no class for.")


class _Window:
    """One array over the images of all row groups of all mapped files, without copy or loop."""

    def __init__(self, groups: Sequence[Pixels]) -> None:
        # The views keep the mappings alive, which the raw window below does not.
        self._groups = groups
        self._starts = np.cumsum([0, *(len(group) for group in groups)])
        if not groups:
            return
        addresses = np.array([group.ctypes.data for group in groups], dtype=np.int64)
        lowest, highest = int(addresses.argmin()), int(addresses.argmax())
        self._nbytes = groups[0][0].nbytes
        self._offsets = addresses - addresses[lowest]
        span = int(self._offsets[highest]) + groups[highest].nbytes
        # Row i of this window is the image that starts i bytes after the lowest mapping, so one
        # fancy index copies images from all files. Memory between the mappings is never read.
        self._bytes = np.lib.stride_tricks.as_strided(
            groups[lowest].reshape(-1).view(np.uint8),
            shape=(span - self._nbytes + 1, self._nbytes),
            strides=(1, 1),
            writeable=False,
        )

    def take(self, rows: Integers) -> Pixels:
        """Return a copy of the bytes of the images ``rows``, (B, H*W*C*bytes)."""
        group = np.searchsorted(self._starts, rows, side="right") - 1
        taken: Pixels = self._bytes[
            self._offsets[group] + (rows - self._starts[group]) * self._nbytes
        ]
        return taken


class NativeReader:
    """Training batches of one rank, shuffled over the whole split by index."""

    def __init__(
        self,
        split: MappedSplit,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        world: int,
        augmentation: AugmentConfig | None,
    ) -> None:
        self._split = split
        self._plan = EpochPlan(len(split), global_batch, seed)
        self._seed = seed
        self._rank, self._world = rank, world
        self._augmentation = augmentation
        per_step = max(1, global_batch * split.image_bytes // world)
        self._together = max(1, _READ_BYTES // per_step)

    @property
    def steps(self) -> int:
        """The number of batches in an epoch, the same on every rank."""
        return self._plan.steps

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on; earlier ones are not read."""
        plan, step = self.plan(epoch), start
        for together, images, labels in self.stretches(epoch, start=start):
            sizes = [len(rows) for rows in together]
            parts = zip(
                together, torch.split(images, sizes), torch.split(labels, sizes), strict=True
            )
            for rows, mine, named in parts:
                weight = plan.weight(step, self._rank, self._world)
                yield Batch(mine, named, rows, weight, plan.batch_size(step), epoch, step)
                step += 1

    def stretches(
        self, epoch: int, *, start: int = 0
    ) -> Iterator[tuple[list[Integers], Tensor, Tensor]]:
        """Yield what is read at once: the rows of some steps, and their images and labels."""
        planned = self.plan(epoch).rank_batches(self._rank, self._world, start=start)
        while together := list(islice(planned, self._together)):
            yield together, *self.read(np.concatenate(together), epoch)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of the batches of ``epoch``."""
        return EpochPlan(self._plan.rows, self._plan.global_batch, self._seed, epoch)

    def read(self, rows: Integers, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the augmented images (B, C, H, W) of ``rows`` in ``epoch``, and their labels."""
        images, labels = self._split.gather(rows)
        if self._augmentation is not None:
            images = augment(images, rows, config=self._augmentation, seed=self._seed, epoch=epoch)
        # Not copied, so as (B, C, H, W) the images are channels-last.
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
