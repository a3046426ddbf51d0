"""How many files each split has, and which row goes into which: pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from medspark.shards.schema import PixelFormat


@dataclass(frozen=True)
class Counts:
    """What a split holds: images, images by class or finding and by site, and patients."""

    rows: int
    by_class: tuple[int, ...]
    patients: int
    by_site: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitLayout:
    """The files of one split; ``first`` is the number of its first file among all."""

    name: str
    rows: int
    shards: int
    first: int


@dataclass(frozen=True)
class Layout:
    """How many files each split has. Their rows differ by one at most."""

    splits: tuple[SplitLayout, ...]

    @classmethod
    def of(cls, counts: dict[str, Counts], pixel_format: PixelFormat, shard_bytes: int) -> Layout:
        """Return as few files as hold at most ``shard_bytes`` of pixels each."""
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
        """Return the number of the file of a row, as a fraction to be rounded down.

        The inverse of cutting ``rows`` at ``rows * n // shards``; for numbers and Spark columns.
        """
        return ((position + 1) * split.shards - 1) / split.rows + split.first

    def bucket(self, name: str, position: int) -> int:
        """Return the number of the file that holds the row at ``position`` of a split."""
        split = next(split for split in self.splits if split.name == name)
        return int(self.number(split, position))

    def file_name(self, bucket: int) -> str:
        """Return the name of a file, by its number among all."""
        split = next(s for s in self.splits if s.first <= bucket < s.first + s.shards)
        return f"{split.name}-{bucket - split.first:05d}.parquet"
