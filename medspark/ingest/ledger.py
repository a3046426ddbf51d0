"""What became of every file: new or known, sample or duplicate or quarantined.

The ledger has one row per decoded frame, and one per file that could not be used. It decides
which rows of the sample files count: what is not a ``sample`` in the ledger is not in the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

SAMPLE, DUPLICATE, QUARANTINED = "sample", "duplicate", "quarantined"

# Two images with the same pixels and different labels: neither can be trusted.
CONFLICTING_LABEL = "conflicting_label"

SCHEMA = pa.schema(
    [
        ("source_key", pa.string()),
        ("file_key", pa.string()),
        ("fingerprint", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("frame", pa.int32()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("duplicate_of", pa.string()),
        ("sample_key", pa.string()),
        ("patient_key", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("site", pa.string()),
        ("pixel_sha256", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
        ("bits", pa.int32()),
        ("part", pa.string()),  # file with the pixels, relative to the dataset
        ("row", pa.int64()),  # and the row in it
    ]
)
SPARK_SCHEMA = from_arrow_schema(SCHEMA)


@dataclass(frozen=True)
class Changes:
    """The files of a source against the ledger, each a set of rows of the listing or the ledger."""

    new: DataFrame
    changed: DataFrame
    unchanged: DataFrame  # rows of the ledger
    deleted: DataFrame  # rows of the ledger
    elsewhere: DataFrame  # rows of the ledger that are of other sources


def compare(files: DataFrame, ledger: DataFrame, *, source_key: str) -> Changes:
    """Compare the ``files`` of a source (file_key, fingerprint, ...) with the ``ledger``."""
    here = ledger.where(F.col("source_key") == source_key)
    known = here.select("file_key", F.col("fingerprint").alias("old")).distinct()
    joined = files.join(known, "file_key", "left")
    same = files.select("file_key", "fingerprint")
    return Changes(
        new=joined.where(F.col("old").isNull()).drop("old"),
        changed=joined.where(F.col("old") != F.col("fingerprint")).drop("old"),
        unchanged=here.join(same, ["file_key", "fingerprint"], "left_semi"),
        deleted=here.join(files.select("file_key"), "file_key", "left_anti"),
        elsewhere=ledger.where(F.col("source_key") != source_key),
    )


def settle(rows: DataFrame) -> DataFrame:
    """Decide among rows with equal pixels: one is the sample, the others duplicate it.

    A row that already was a sample stays one; else held-out hints come first, then the order of
    the file keys. Equal pixels with unequal labels are all quarantined. Rows without pixels
    pass unchanged. The answer depends on the set of rows only, so ingesting in several runs, or
    again, settles the same.
    """
    pixels = rows.where(F.col("pixel_sha256").isNotNull())
    same = Window.partitionBy("pixel_sha256")
    first = same.orderBy(
        F.when(F.col("outcome") == SAMPLE, 0).otherwise(1), _hint_rank(), "file_key", "frame"
    )
    labels_differ = F.min("label").over(same) != F.max("label").over(same)
    ranked = pixels.withColumn("rank", F.row_number().over(first))
    ranked = ranked.withColumn("kept", F.first("sample_key").over(first))
    ranked = ranked.withColumn("conflict", labels_differ)
    duplicate = (F.col("rank") > 1) & ~F.col("conflict")
    settled = (
        ranked.withColumn(
            "outcome",
            F.when(F.col("conflict"), QUARANTINED).when(duplicate, DUPLICATE).otherwise(SAMPLE),
        )
        .withColumn("reason", F.when(F.col("conflict"), CONFLICTING_LABEL))
        .withColumn("message", F.when(F.col("conflict"), "the same pixels carry another label"))
        .withColumn("duplicate_of", F.when(duplicate, F.col("kept")))
    )
    without = rows.where(F.col("pixel_sha256").isNull())
    return settled.select(SCHEMA.names).unionByName(without.select(SCHEMA.names))


def _hint_rank() -> Column:
    # Of two copies, the one in a published test set is kept, so that the set stays whole.
    split = F.col("split")
    return F.when(split == "test", 0).when(split == "val", 1).when(split == "train", 2).otherwise(3)


def per_file(ledger: DataFrame) -> DataFrame:
    """Return one row per file: the best outcome among its frames, and the reason if there is none.

    A file of which any frame is a sample is a sample; one whose frames all duplicate others is a
    duplicate; so every file counts once.
    """
    rank = F.when(F.col("outcome") == SAMPLE, 0).when(F.col("outcome") == DUPLICATE, 1).otherwise(2)
    best = F.min(F.struct(rank.alias("rank"), "outcome", "reason", "message", "size", "sha256"))
    return (
        ledger.groupBy("source_key", "file_key")
        .agg(best.alias("best"))
        .select("source_key", "file_key", "best.*")
    )


def cross_patient_duplicates(ledger: DataFrame) -> int:
    """Return how many images were found under more than one patient."""
    shared = ledger.where(F.col("outcome").isin(SAMPLE, DUPLICATE)).groupBy("pixel_sha256")
    patients = shared.agg(F.min("patient_key").alias("low"), F.max("patient_key").alias("high"))
    return patients.where(F.col("low") != F.col("high")).count()


def union(frames: list[DataFrame]) -> DataFrame:
    """Return the rows of all ``frames``, with the ledger's columns."""
    return reduce(DataFrame.unionByName, [frame.select(SCHEMA.names) for frame in frames])
