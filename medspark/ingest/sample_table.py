"""The rows of a sample dataset that may be published as a table: one per sample, without pixels."""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark.errors import UsageError
from medspark.ingest import ledger
from medspark.ingest.sample_set import SampleSet
from medspark.spark.table import publish

# Neither file nor content keys, which the private quarantine list and an archive's owner could
# match, nor places of files.
COLUMNS = (
    "sample_key", "patient_key", "label", "split", "site", "frame", "height", "width", "channels",
    "bits", "pixel_key",
)  # fmt: skip


def publish_samples(spark: SparkSession, samples: str, table: str) -> None:
    """Publish the samples of the dataset at the URL ``samples`` as ``table``.

    ``dataset`` is the digest of the dataset that a row belongs to. Raises UsageError if no ingest
    has finished there, and what ``publish`` raises.
    """
    dataset = SampleSet(samples)
    manifest = dataset.manifest()
    if manifest is None:
        raise UsageError(f"{samples} holds no samples: no ingest has finished there.")
    rows = dataset.read_ledger(spark, manifest.ledger, manifest.superseded)
    live: DataFrame = rows.where(F.col("outcome") == ledger.SAMPLE)
    published = live.select(*COLUMNS, F.lit(manifest.digest).alias("dataset"))
    publish(spark, published, table, "samples")
