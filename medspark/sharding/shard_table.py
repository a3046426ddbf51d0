"""The rows of a shard dataset that may be published as a table: one per sample, without pixels."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from medspark.ingest.labels import BETWEEN_FINDINGS
from medspark.shards.manifest import Manifest, read_manifest
from medspark.spark.table import publish
from medspark.spark.tables import read_files

# Older shards have no site.
_READ = T.StructType(
    [
        *(T.StructField(name, T.StringType()) for name in ("sample_key", "patient_key", "site")),
        T.StructField("label", T.IntegerType()),
    ]
)


def publish_shards(spark: SparkSession, shards: Path, table: str) -> None:
    """Publish what the shards in the folder ``shards`` hold as ``table``.

    ``label`` is the name of the class, or the names of all findings. ``dataset`` is the digest of
    the shards that a row belongs to. Raises UsageError if there are no shards, and what
    ``publish`` raises.
    """
    manifest = read_manifest(shards)
    splits = [
        _split(spark, [str(shards / shard.path) for shard in split.shards], name)
        for name, split in manifest.splits.items()
        if split.shards
    ]
    constants = {
        name: F.lit(getattr(manifest, name)) for name in ("height", "width", "channels", "bits")
    }
    rows = reduce(lambda one, other: one.unionByName(other), splits).select(
        "sample_key", "patient_key", _label(manifest).alias("label"), "split", "site",
        *[value.alias(name) for name, value in constants.items()],
        F.lit(manifest.digest).alias("dataset"),
    )  # fmt: skip
    publish(spark, rows, table, "shards")


def _split(spark: SparkSession, paths: list[str], name: str) -> DataFrame:
    return read_files(spark, paths, _READ).withColumn("split", F.lit(name))


def _label(manifest: Manifest) -> Column:
    """Return the label's name, from its number or from the mask of its findings."""
    names, number = manifest.classes, F.col("label")
    if not manifest.multi_label:
        return F.element_at(F.array(*map(F.lit, names)), number + 1)
    found = [
        F.when(number.bitwiseAND(1 << bit) != 0, F.lit(name)) for bit, name in enumerate(names)
    ]
    return F.concat_ws(BETWEEN_FINDINGS, *found)
