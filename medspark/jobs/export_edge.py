"""Export a model for devices without torch, and report how robust the export is.

Reads   a model (folder or MLflow URI) and the shards that jobs/shard.py wrote
Writes  a folder for each backend and precision, a parity report, the result as JSON, MLflow runs

    spark-submit jobs/export_edge.py --model MODEL --shards DIR --precision fp32,int8

To resume an export that was killed, give the same command again. On the device:
python -m medspark.export.predict FOLDER image.dcm
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from medspark.export.packages import check_backends
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.export_edge_config import ExportEdgeConfig

if TYPE_CHECKING:
    from medspark.export.result import ExportResult


class ExportEdgeJob(JobConfig, ExportEdgeConfig):
    """Export one model."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: ExportEdgeJob) -> ExportResult:
    """Export the model, print the table and the flags, and return the result."""
    check_backends(config.backend, config.precision)
    from medspark.workflows.export_edge import EdgeExport  # torch: not for --help

    export = EdgeExport(config)
    with spark_session(config.spark, name="medspark export_edge") as spark:
        result = export.run(spark)
    print(_summary(result))
    return result


def _summary(result: ExportResult) -> str:
    from medspark.export.parity_report import summary_lines

    return "\n".join([*summary_lines(result), f"report: {result.report}"])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(ExportEdgeJob, work, argv)
