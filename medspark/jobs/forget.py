"""Remove patients from samples, and name the shards and models that learnt from their images.

Reads   a text file of patients, one per line, and the sample dataset --samples
Writes  the sample dataset without them, the private list of quarantined files, and the result as
        JSON

    spark-submit jobs/forget.py --samples SAMPLES --patients FILE

Their pixels are gone from the dataset's folder when the job ends; copies, backups and snapshots of
the folder are not touched. Delete the files from the archive too: the next ingest of it would add
them again. Then make the shards anew and train again; the job names what is no longer covered.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from medspark.ingest.forget import open_dataset, read_patients
from medspark.job import JobConfig, run_job
from medspark.spark.session import SparkConfig, spark_session
from medspark.workflows.forget import ForgetResult, ForgetWorkConfig, forget_patients


class ForgetJob(JobConfig, ForgetWorkConfig):
    """Remove patients from one sample dataset."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: ForgetJob) -> ForgetResult:
    """Remove the patients, print what was removed, and return the result."""
    dataset = open_dataset(config)
    patients = read_patients(config.patients, dataset.pseudonyms)
    with spark_session(config.spark, name="medspark forget") as spark:
        result = forget_patients(spark, config, dataset, patients)
    print(summary(result))
    return result


def summary(result: ForgetResult) -> str:
    """Return what was removed, and what had been made from it, as text."""
    names = "samples", "duplicates", "quarantined"
    counts = ", ".join(f"{getattr(result, name)} {name}" for name in names)
    done = "would be removed" if result.dry_run else "removed"
    lines = [f"{result.patients} patients {done}: {counts}, from {result.files} files"]
    if result.unknown_lines:
        named = ", ".join(map(str, result.unknown_lines))
        lines.append(f"no patient of these samples is named in line {named}")
    lines += [
        f"no longer covered: shards {each.folder} ({each.images} images, digest {each.digest[:12]})"
        for each in result.shards
    ]
    for run in result.runs:
        models = f", model {', '.join(run.models)}" if run.models else ""
        doubt = "" if run.certain else "; its data is gone or was made anew, so it may have none"
        lines.append(f"no longer covered: run {run.name} {run.run_id}{models}{doubt}")
    if result.mlflow_error:
        lines.append(f"MLflow was not asked which models learnt from them: {result.mlflow_error}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(ForgetJob, work, argv)
