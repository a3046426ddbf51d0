"""Encode a sample's label as the number that a shard stores: a class, or a mask of findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from medspark.errors import UsageError
from medspark.ingest.labels import BETWEEN_FINDINGS, check_length
from medspark.shards.schema import MOST_FINDINGS


@dataclass(frozen=True)
class ClassEncoding:
    """Every image has one label. Its number is the label's index among the classes."""

    multi_label = False

    def names(self, labels: Iterable[str]) -> set[str]:
        """Return the class names that occur in ``labels``."""
        return set(labels)

    def check(self, classes: list[str]) -> None:
        """Raise UsageError if a name in ``classes`` is too long."""
        check_length(max(map(len, classes), default=0))

    def kept(self, samples: DataFrame, classes: list[str]) -> DataFrame:
        """Return the samples whose label is one of ``classes``."""
        return samples.where(F.col("label").isin(classes))

    def number(self, classes: list[str]) -> Column:
        """Return the column expression of a label's number: the index of its class."""
        place = F.array_position(F.array(*[F.lit(name) for name in classes]), F.col("label"))
        return (place - 1).cast("int")

    def by_class(self, images: Mapping[int, int], count: int) -> tuple[int, ...]:
        """Return the number of images of each of ``count`` classes, given counts by number."""
        return tuple(images.get(number, 0) for number in range(count))


@dataclass(frozen=True)
class FindingsEncoding(ClassEncoding):
    """An image has any number of findings. Its number is a mask: bit k is set for finding k."""

    multi_label = True

    def names(self, labels: Iterable[str]) -> set[str]:
        """Return the finding names that occur in ``labels``."""
        return {name for label in labels for name in label.split(BETWEEN_FINDINGS) if name}

    def check(self, classes: list[str]) -> None:
        """Raise UsageError if a name is too long, or a mask cannot hold the ``classes``."""
        super().check(classes)
        if not 2 <= len(classes) <= MOST_FINDINGS:
            raise UsageError(
                f"There are {len(classes)} findings, and shards hold 2 to {MOST_FINDINGS}: choose "
                "findings with --classes, or give one label per image."
            )

    def kept(self, samples: DataFrame, classes: list[str]) -> DataFrame:  # noqa: ARG002
        """Return all samples: an image without any of the findings is a negative for each."""
        return samples

    def number(self, classes: list[str]) -> Column:
        """Return the column expression of a label's number: the mask of its findings."""
        has = F.split("label", f"[{BETWEEN_FINDINGS}]")
        bits = [
            F.when(F.array_contains(has, name), 1 << k).otherwise(0)
            for k, name in enumerate(classes)
        ]
        return reduce(Column.__add__, bits).cast("int")

    def by_class(self, images: Mapping[int, int], count: int) -> tuple[int, ...]:
        """Return the number of images with each of ``count`` findings, given counts by mask."""
        return tuple(
            sum(times for mask, times in images.items() if mask >> k & 1) for k in range(count)
        )
