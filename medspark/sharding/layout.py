"""Compute how many files each split has, and the file of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from medspark.shards.schema import PixelFormat


@dataclass(frozen=True)
class Counts:
    """Counts of a split: images, images by class or finding, patients, and images by site."""

    rows: int
    by_class: tuple[int, ...]
    patients: int
    by_site: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitLayout:
    """The files of one split. ``first`` numbers its first file among the files of all splits."""

    name: str
    rows: int
    shards: int
    first: int


@dataclass(frozen=True)
class Layout:
    """The number of files of each split. Files of a split differ by one row at most."""

    splits: tuple[SplitLayout, ...]

    @classmethod
    def of(cls, counts: dict[str, Counts], pixel_format: PixelFormat, shard_bytes: int) -> Layout:
        """Return the layout with the fewest files of at most ``shard_bytes`` of pixels each."""
        splits: list[SplitLayout] = []
        for name, count in counts.items():
            shards = math.ceil(count.rows * pixel_format.nbytes / shard_bytes)
            first = splits[-1].first + splits[-1].shards if splits else 0
            splits.append(SplitLayout(name, count.rows, min(shards, count.rows), first))
        return cls(tuple(splits))

    @property
    def shards(self) -> int:
        """The number of files of all splits."""
        return sum(split.shards for split in self.splits)

    def buckets(self, name: str) -> range:
        """Return the numbers of the files of a split."""
        split = next(split for split in self.splits if split.name == name)
        return range(split.first, split.first + split.shards)

    @staticmethod
    def number(split: SplitLayout, position: Any) -> Any:
        """Return the file number of the row at ``position``, as a fraction to round down.

        This inverts the cuts of ``rows`` at ``rows * n // shards``. ``position`` may be a number
        or a Spark column.
        """
        return ((position + 1) * split.shards - 1) / split.rows + split.first

    def bucket(self, name: str, position: int) -> int:
        """Return the number of the file with the row at ``position`` of a split."""
        split = next(split for split in self.splits if split.name == name)
        return int(self.number(split, position))

    def file_name(self, bucket: int) -> str:
        """Return the name of the file of number ``bucket`` among the files of all splits."""
        split = next(s for s in self.splits if s.first <= bucket < s.first + s.shards)
        return f"{split.name}-{bucket - split.first:05d}.parquet"
