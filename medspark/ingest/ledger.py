"""What became of every file: new or known, sample or duplicate or quarantined.

The ledger has one row per decoded frame, and one per file that could not be used. It decides
which rows of the sample files count: what is not a ``sample`` in the ledger is not in the dataset.
"""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from medspark.images.reasons import Reason

SAMPLE, DUPLICATE, QUARANTINED = "sample", "duplicate", "quarantined"

# Two images with the same pixels and different labels: neither can be trusted.
CONFLICTING_LABEL = Reason.CONFLICTING_LABEL.value

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


NEW, CHANGED, UNCHANGED, DELETED = "new", "changed", "unchanged", "deleted"
# A file that is gone and was no sample: said once, and then the ledger does not know it any more.
FORGOTTEN = "forgotten"


def compare(files: DataFrame, ledger: DataFrame) -> DataFrame:
    """Return ``files`` (file_key, fingerprint, ...) with their ``status`` against the ``ledger``.

    A file of the ledger that is not there any more has a row too: as deleted if it is a sample,
    else as forgotten.
    """
    known = ledger.groupBy("file_key").agg(
        F.first("fingerprint").alias("old"),
        F.max((F.col("outcome") == SAMPLE).cast("int")).alias("was_sample"),
    )
    status = (
        F.when(F.col("old").isNull(), NEW)
        .when(F.col("fingerprint").isNull() & (F.col("was_sample") == 1), DELETED)
        .when(F.col("fingerprint").isNull(), FORGOTTEN)
        .when(F.col("fingerprint") == F.col("old"), UNCHANGED)
        .otherwise(CHANGED)
    )
    joined = files.join(known, "file_key", "full").withColumn("status", status)
    return joined.drop("old", "was_sample")


def remaining(ledger: DataFrame, files: DataFrame) -> DataFrame:
    """Return the rows of ``ledger`` that still hold, given ``files`` with their status.

    Of a deleted file the samples stay and nothing else does.
    """
    status = files.where(F.col("status").isin(UNCHANGED, DELETED)).select("file_key", "status")
    kept = (F.col("status") == UNCHANGED) | (F.col("outcome") == SAMPLE)
    return ledger.join(status, "file_key").where(kept).select(SCHEMA.names)


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


def exchanged(before: DataFrame, after: DataFrame) -> tuple[int, int]:
    """Return how many samples came and how many went between two ledgers."""
    old = before.where(F.col("outcome") == SAMPLE).select("sample_key", F.lit(1).alias("old"))
    new = after.where(F.col("outcome") == SAMPLE).select("sample_key", F.lit(1).alias("new"))
    row = (
        old.join(new, "sample_key", "full")
        .agg(
            F.count(F.when(F.col("old").isNull(), 1)).alias("added"),
            F.count(F.when(F.col("new").isNull(), 1)).alias("removed"),
        )
        .first()
    )
    assert row is not None
    return row["added"], row["removed"]
