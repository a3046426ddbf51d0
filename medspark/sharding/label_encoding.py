"""How a sample's label becomes the number that a shard stores: its class, or a mask of findings."""

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
    """Every image has one label, and its number is the label's place among the classes."""

    multi_label = False

    def names(self, labels: Iterable[str]) -> set[str]:
        """Return what there is to learn."""
        return set(labels)

    def check(self, classes: list[str]) -> None:
        """Raise UsageError where ``classes`` cannot be numbered or shown."""
        check_length(max(map(len, classes), default=0))

    def kept(self, samples: DataFrame, classes: list[str]) -> DataFrame:
        """Return the samples that ``classes`` say something of."""
        return samples.where(F.col("label").isin(classes))

    def number(self, classes: list[str]) -> Column:
        """Return the number of a sample's label."""
        place = F.array_position(F.array(*[F.lit(name) for name in classes]), F.col("label"))
        return (place - 1).cast("int")

    def by_class(self, images: Mapping[int, int], count: int) -> tuple[int, ...]:
        """Return the images of each of ``count`` classes, given the images by number."""
        return tuple(images.get(number, 0) for number in range(count))


@dataclass(frozen=True)
class FindingsEncoding(ClassEncoding):
    """An image has any of the classes, and its number has a bit for each that it has."""

    multi_label = True

    def names(self, labels: Iterable[str]) -> set[str]:
        """Return what there is to learn."""
        return {name for label in labels for name in label.split(BETWEEN_FINDINGS) if name}

    def check(self, classes: list[str]) -> None:
        """Raise UsageError where ``classes`` cannot be numbered or shown."""
        super().check(classes)
        if not 2 <= len(classes) <= MOST_FINDINGS:
            raise UsageError(
                f"There are {len(classes)} findings, and shards hold 2 to {MOST_FINDINGS}: "
                "name the ones to learn with --classes, or give one label per image."
            )

    def kept(self, samples: DataFrame, classes: list[str]) -> DataFrame:  # noqa: ARG002
        """Return all samples: one that has none of the findings says so of each."""
        return samples

    def number(self, classes: list[str]) -> Column:
        """Return the number of a sample's label."""
        has = F.split("label", f"[{BETWEEN_FINDINGS}]")
        bits = [
            F.when(F.array_contains(has, name), 1 << k).otherwise(0)
            for k, name in enumerate(classes)
        ]
        return reduce(Column.__add__, bits).cast("int")

    def by_class(self, images: Mapping[int, int], count: int) -> tuple[int, ...]:
        """Return the images that have each of ``count`` findings, given the images by number."""
        return tuple(
            sum(times for mask, times in images.items() if mask >> k & 1) for k in range(count)
        )
