"""Fit detectors of attacked images, keep the best as the model's guard, and attack through it.

Reads   a model (folder or MLflow URI) and the shards that jobs/shard.py wrote
Writes  the guard beside the model, a report (Markdown, HTML), the result as JSON, one MLflow run

    spark-submit jobs/detect.py --model MODEL --shards DIR --detectors kde,lid,mahalanobis

Every figure under an oblivious attack stands beside that of the worst attack through the detector.
To resume a detection that was killed, give the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from medspark.defend.detect.result import DetectResult
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.detect_config import DetectConfig


class DetectJob(JobConfig, DetectConfig):
    """Fit and attack the detectors of one model."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: DetectJob) -> DetectResult:
    """Fit and attack the detectors, print the tables, and return the result."""
    from medspark.workflows.detect import Detection  # torch: not for --help

    detection = Detection(config)
    with spark_session(config.spark, name="medspark detect") as spark:
        result = detection.run(spark)
    print(_summary(result))
    return result


def _summary(result: DetectResult) -> str:
    from medspark.defend.detect.report import matrix, sentences

    rows = matrix(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    about = "AUROC by layer, oblivious / adaptive"
    return "\n".join([about, *lines, *sentences(result), f"report: {result.report}"])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(DetectJob, work, argv)
