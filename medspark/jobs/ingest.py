"""Turn an archive of medical images into a dataset of de-identified samples for training.

Reads   DICOM, PNG, JPEG, TIFF and BMP files below --source, with labels from a table, from folder
        names or from DICOM, or a MedMNIST .npz file
Writes  the sample dataset --samples (Parquet, a quarantine table and a manifest), the result as
        JSON, a private list of the quarantined files' paths outside the dataset, and, if
        --table names one, a table of the samples without pixels

    spark-submit jobs/ingest.py --source DIR --labels DIR/labels.csv --samples OUT --image_size 64

The same command, given again, adds new files, replaces changed ones, and adds nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_table import publish_samples
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session
from medspark.spark.table import TableConfig, check_table


class IngestJob(JobConfig, IngestConfig, TableConfig):
    """Ingest one archive."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: IngestJob) -> dict[str, Any]:
    """Ingest the archive, print the file counts, and return the result."""
    archive = open_archive(config)
    with spark_session(config.spark, name="medspark ingest") as spark:
        if config.table is not None:
            check_table(spark, config.table, "samples")
        result = ingest(spark, archive)
        if config.table is not None and not config.dry_run:
            publish_samples(spark, archive.samples.url, config.table)
            result |= {"table": config.table}
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
    private = [f"paths of the quarantined files (private): {listed}"] if listed else []
    return "\n".join([f"{seen} = {outcomes}  ({changes})", *reasons, *private])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(IngestJob, work, argv)
