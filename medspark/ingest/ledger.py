"""The ledger: the outcome of every file (sample, duplicate or quarantined).

The ledger has one row per decoded frame, and one per file that could not be used. It decides which
rows of the sample files count: a row that is not a ``sample`` in the ledger is not in the dataset.

The ledger names no file. Its digests cannot be computed without the key of the pseudonyms.
"""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from medspark import storage
from medspark.images.reasons import Reason

SAMPLE, DUPLICATE, QUARANTINED = "sample", "duplicate", "quarantined"

# Images with equal pixels and different labels: none of the labels is reliable.
CONFLICTING_LABEL = Reason.CONFLICTING_LABEL.value

SCHEMA = pa.schema(
    [
        ("source_key", pa.string()),
        ("file_key", pa.string()),
        ("fingerprint", pa.string()),
        ("size", pa.int64()),
        ("content_key", pa.string()),  # of the file's SHA-256
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
        ("pixel_key", pa.string()),  # of the SHA-256 of the stored values
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
        ("bits", pa.int32()),
        ("part", pa.string()),  # file with the pixels, relative to the dataset
        ("row", pa.int64()),  # and the row in it
        ("sealed", pa.string()),  # columns that medspark.ingest.sealing hides in quarantined rows
    ]
)
# What the files of the ledger hold: also whether a file was there at the last ingest of its source,
# whether the row speaks for its file, and the generation that the row was settled in.
STORED = pa.schema(
    [
        *SCHEMA,
        ("present", pa.bool_()),
        ("speaks_for_file", pa.bool_()),
        ("generation", pa.string()),
    ]
)
# Identifies a stored row; ``frame`` may be null.
IDENTITY = ("generation", "file_key", "frame")
# During an ingest, a row also has the sealed path of its file, if known, and whether the file is
# present now. settle() adds flags; its docstring says on which row each flag is set.
ROW_NAMES = [*SCHEMA.names, "sealed_path", "present"]
SETTLED_NAMES = [*ROW_NAMES, "shared", "first_of_patient", "speaks_for_file"]

NEW, CHANGED, UNCHANGED, DELETED = "new", "changed", "unchanged", "deleted"
# A file that is gone and was not a sample: reported once, then dropped from the ledger.
FORGOTTEN = "forgotten"


def compare(files: DataFrame, ledger: DataFrame, *, all_files: bool = True) -> DataFrame:
    """Return ``files`` (file_key, fingerprint, ...) with their ``status`` against the ``ledger``.

    A file of the ledger that no longer exists has a row too: deleted if it was a sample, else
    forgotten. A file is also changed if the privacy setting now stores its site differently. A file
    is ``touched`` if its rows in the ledger have to be written again, or are not there yet.
    If ``files`` are not ``all_files``, the others are unchanged.
    """
    known = ledger.groupBy("file_key").agg(
        F.first("fingerprint").alias("old"),
        F.max("site").alias("old_site"),
        F.max((F.col("outcome") == SAMPLE).cast("int")).alias("was_sample"),
        F.max(F.coalesce("present", F.lit(True))).alias("was_present"),
    )
    same_site = F.col("old_site").isNull() | F.col("old_site").eqNullSafe(F.col("site"))
    status = (
        F.when(F.col("fingerprint").isNull() & (not all_files) & F.col("was_present"), UNCHANGED)
        .when(F.col("old").isNull(), NEW)
        .when(F.col("fingerprint").isNull() & (F.col("was_sample") == 1), DELETED)
        .when(F.col("fingerprint").isNull(), FORGOTTEN)
        # The target of a link outside is not read, so an earlier sample stays a sample.
        .when((F.col("size") == storage.OUTSIDE) & (F.col("was_sample") == 1), UNCHANGED)
        .when((F.col("fingerprint") == F.col("old")) & same_site, UNCHANGED)
        .otherwise(CHANGED)
    )
    joined = files.join(known, "file_key", "full").withColumn("status", status)
    touched = (
        F.when(F.col("status") == DELETED, F.col("was_present"))
        .when(F.col("status") == UNCHANGED, ~F.col("was_present"))
        .otherwise(True)
    )
    rows = joined.withColumn("touched", touched)
    return rows.drop("old", "old_site", "was_sample", "was_present")


def remaining(ledger: DataFrame, files: DataFrame) -> DataFrame:
    """Return the rows of ``ledger`` that stay valid, given ``files`` with their status.

    A deleted file keeps its samples and loses its other rows.
    """
    status = files.where(F.col("status").isin(UNCHANGED, DELETED))
    kept = (F.col("status") == UNCHANGED) | (F.col("outcome") == SAMPLE)
    return (
        ledger.join(status.select("file_key", "status", "sealed_path"), "file_key")
        .where(kept)
        .withColumn("present", F.col("status") == UNCHANGED)
        .select(ROW_NAMES)
    )


def settle(rows: DataFrame, *, others: DataFrame | None = None) -> DataFrame:
    """Decide among rows with equal pixels: one is the sample, the others are its duplicates.

    A row that already was a sample stays one. Otherwise held-out hints come first, then the order
    of the sample keys. Rows with equal pixels and different labels are all quarantined. Rows
    without pixels pass unchanged. The result depends on the set of rows only, so a repeated ingest,
    or several partial ones, give the same result. ``rows`` have ROW_NAMES; the result adds flags:

    - ``shared``, on one row per image: present files show the image under several patients;
    - ``first_of_patient``, on one row per patient with samples;
    - ``speaks_for_file``, on one row per file: its best frame (sample, duplicate, quarantined).

    ``others`` are settled rows of the same patients and files, whose outcomes stay.
    """
    decided = _with_outcomes(rows)
    if others is not None:
        kept = others.withColumn("shared", F.lit(False))
        decided = decided.select(*ROW_NAMES, "shared").unionByName(
            kept.select(*ROW_NAMES, "shared")
        )
    return _with_verdicts(decided).select(SETTLED_NAMES)


def _with_outcomes(rows: DataFrame) -> DataFrame:
    pixels = F.col("pixel_key")
    same = Window.partitionBy("image")
    standing = F.when(F.col("outcome") == SAMPLE, 0).otherwise(1)
    # File keys depend on where the archive lies, sample keys do not.
    first = same.orderBy(standing, hint_rank(), "sample_key", "file_key", "frame")
    patient = F.when(F.col("present"), F.col("patient_key"))
    ranked = (
        rows.withColumn("image", F.coalesce(pixels, F.col("file_key")))
        .withColumn("rank", F.row_number().over(first))
        .withColumn("kept", F.first("sample_key").over(first))
        .withColumn("labels_differ", F.min("label").over(same) != F.max("label").over(same))
        .withColumn("patients_differ", F.min(patient).over(same) != F.max(patient).over(same))
    )
    conflict = pixels.isNotNull() & F.col("labels_differ")
    duplicate = pixels.isNotNull() & ~F.col("labels_differ") & (F.col("rank") > 1)
    outcome = (
        F.when(pixels.isNull(), F.col("outcome"))
        .when(conflict, QUARANTINED)
        .when(duplicate, DUPLICATE)
        .otherwise(SAMPLE)
    )
    once = pixels.isNotNull() & ~F.col("labels_differ") & (F.col("rank") == 1)
    message = F.lit("the same pixels carry another label")
    return (
        ranked.withColumn("outcome", outcome)
        .withColumn(
            "reason", F.when(pixels.isNull(), F.col("reason")).when(conflict, CONFLICTING_LABEL)
        )
        .withColumn("message", F.when(pixels.isNull(), F.col("message")).when(conflict, message))
        .withColumn("duplicate_of", F.when(duplicate, F.col("kept")))
        .withColumn("shared", F.coalesce(once & F.col("patients_differ"), F.lit(False)))
    )


def _with_verdicts(rows: DataFrame) -> DataFrame:
    # A file's rows belong to one patient, or the file has one row: one shuffle serves both windows.
    sample = F.col("outcome") == SAMPLE
    rank = F.when(sample, 0).when(F.col("outcome") == DUPLICATE, 1).otherwise(2)
    owner = Window.partitionBy("owner").orderBy(rank)
    file = Window.partitionBy("owner", "source_key", "file_key").orderBy(rank, "reason", "frame")
    return (
        rows.withColumn("owner", F.coalesce("patient_key", "file_key"))
        .withColumn("first_of_patient", sample & (F.row_number().over(owner) == 1))
        .withColumn("speaks_for_file", F.row_number().over(file) == 1)
    )


def hint_rank() -> Column:
    """Return the rank of the column ``split``: 0 for test, 1 for val, 2 for train, 3 for none."""
    # Of two copies, keep the one in a published test set, so that the set stays complete.
    split = F.col("split")
    return F.when(split == "test", 0).when(split == "val", 1).when(split == "train", 2).otherwise(3)


def exchanged(before: DataFrame, after: DataFrame) -> tuple[int, int]:
    """Return how many samples were added and how many removed between two ledgers."""
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
