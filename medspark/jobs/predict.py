"""Apply a model to an archive of images without labels: a row for each file, in Parquet.

Reads   DICOM, PNG, JPEG, TIFF and BMP files below --source, and a model: a folder (trained, pruned,
        ONNX or int8) or an MLflow URI
Writes  the folder --answers (answers and quarantine under pseudonymous keys, in Parquet), the
        result as JSON, and private lists of the files' paths outside of that folder

    spark-submit jobs/predict.py --model MODEL --source ARCHIVE --answers FOLDER

To resume a prediction that was killed, give the same command again: each file gets one row. Later
the same command answers new and changed files, and drops the rows of deleted ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from medspark.job import JobConfig, run_job
from medspark.predict.config import PredictConfig
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.predict import Prediction, PredictResult


class PredictJob(JobConfig, PredictConfig):
    """Apply one model to one archive."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: PredictJob) -> PredictResult:
    """Answer the files, print the counts, and return the result."""
    prediction = Prediction(config)
    with spark_session(config.spark, name="medspark predict") as spark:
        result = prediction.run(spark)
    print(_summary(result))
    return result


def _summary(result: PredictResult) -> str:
    speed = result.images_per_second
    now = f"{result.done_now} now" + (f", {speed:.1f} a second" if speed else "")
    lines = [
        f"{result.files_found} files found = {result.answered} answered + {result.quarantined} "
        f"quarantined  ({result.done_before} before, {now})"
    ]
    counts = (*result.labels.items(), *result.quarantine_reasons.items())
    lines += [f"  {count:>8} {name}" for name, count in counts]
    lines += [f"paths of all files (private): {result.paths_file}"] if result.paths_file else []
    return "\n".join([*lines, f"answers: {result.answers}"])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(PredictJob, work, argv)
