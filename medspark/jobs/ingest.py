"""Turn an archive of medical images into a dataset of de-identified samples, ready for a network.

Reads   DICOM, PNG, JPEG, TIFF, BMP below --source, with labels from a table, folders or DICOM
Writes  the sample dataset --samples (Parquet, with quarantine and manifest), added to on rerun;
        outside of it, for you alone, the paths of the files in quarantine

    spark-submit jobs/ingest.py --source DIR --labels DIR/labels.csv --samples OUT --image_size 64
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session


class IngestJob(JobConfig, IngestConfig):
    """Ingest one archive."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: IngestJob) -> dict[str, Any]:
    """Ingest, print the sum, and return it."""
    archive = open_archive(config)
    with spark_session(config.spark, name="medspark ingest") as spark:
        result = ingest(spark, archive)
    print(_summary(result))
    return result


def _summary(result: dict[str, Any]) -> str:
    seen = f"{result['files_seen']} files seen"
    changes = ", ".join(f"{result[k]} {k}" for k in ("new", "changed", "unchanged", "deleted"))
    if result.get("dry_run"):
        return f"dry run: {seen}: {changes}"
    outcomes = " + ".join(f"{result[k]} {k}" for k in ("samples", "duplicates", "quarantined"))
    reasons = [f"  {count:>8} {reason}" for reason, count in result["quarantine_reasons"].items()]
    listed = result["quarantine_file"]
    private = [f"their paths, for whoever mends the archive (private): {listed}"] if listed else []
    return "\n".join([f"{seen} = {outcomes}  ({changes})", *reasons, *private])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(IngestJob, work, argv)
