"""Assign every sample a split and a position in it, and check that the splits are disjoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from medspark.errors import RunError
from medspark.shards.split import SplitConfig, patient_split
from medspark.spark.task import map_batches


def assign_splits(live: DataFrame, number: Column, config: SplitConfig, *, seed: int) -> DataFrame:
    """Return every sample with its split (``target``) and its ``position`` in the shuffled split.

    ``live`` holds the samples, with a ``group`` of patients that share a split. ``number`` is the
    column expression of the label's number.
    """
    own = [row["split"] for row in live.select("split").distinct().collect() if row["split"]]
    hints = live.groupBy("group").agg(F.collect_set("split").alias("hints"))
    groups = map_batches(hints, _AssignGroups(config, seed, own), "group string, target string")
    # SHA-256, so that the shuffle can be repeated without Spark.
    order = F.sha2(F.concat(F.lit(f"{seed}\n"), F.col("sample_key")), 256)
    shuffled = Window.partitionBy("target").orderBy(order, "sample_key")
    return (
        live.join(groups, "group")
        .withColumn("number", number)
        .withColumn("position", (F.row_number().over(shuffled) - 1).cast("bigint"))
        .select(
            "target", "position", "sample_key", "patient_key", "site", "number", "split",
            "pixel_key", "part", "row",
        )
    )  # fmt: skip


def leak_check(assigned: DataFrame) -> dict[str, int]:
    """Return counts of leaks between splits, and of images whose split differs from their hint.

    Raises RunError if a patient or an image is in two splits.
    """
    leaks = {
        "patients_in_two_splits": _in_two(assigned, "patient_key"),
        "images_in_two_splits": _in_two(assigned, "pixel_key"),
    }
    if any(leaks.values()):
        raise RunError(f"The splits are not disjoint: {leaks}.")
    moved = assigned.where(F.col("split").isNotNull() & (F.col("split") != F.col("target")))
    # A patient whose images have several hints goes to the most held-out split among them.
    overruled = moved.where(F.col("split") != "train").count()
    hinted = assigned.where(F.col("split").isNotNull()).groupBy("patient_key")
    both = hinted.agg(F.countDistinct("split").alias("hints")).where(F.col("hints") > 1).count()
    return leaks | {"hints_overruled": overruled, "patients_with_several_hints": both}


def _in_two(assigned: DataFrame, column: str) -> int:
    targets = assigned.groupBy(column).agg(
        F.min("target").alias("low"), F.max("target").alias("high")
    )
    return targets.where(F.col("low") != F.col("high")).count()


@dataclass(frozen=True)
class _AssignGroups:
    """Assigns groups of patients to splits, in a task."""

    config: SplitConfig
    seed: int
    own: list[str]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            groups = batch.column("group").to_pylist()
            hints = batch.column("hints").to_pylist()
            targets = [
                patient_split(group, hint, self.config, seed=self.seed, own=self.own)
                for group, hint in zip(groups, hints, strict=True)
            ]
            yield pa.RecordBatch.from_pydict({"group": groups, "target": targets})
