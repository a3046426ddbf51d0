"""Fine-tune a classifier on adversarial examples made during training, one process per device.

Reads   the shards that jobs/shard.py wrote; without --shards, built-in demo data
Writes  the model, the result as JSON, and one MLflow run per training

    spark-submit jobs/train_at.py --shards SHARDS --model.name mobilenetv2_100 --launch.processes 2

To resume an interrupted training, give the same command with --run_dir RUN --resume auto.
"""

from __future__ import annotations

from collections.abc import Sequence

from medspark.job import run_job
from medspark.train.result import TrainResult
from medspark.workflows.train_at import TrainAtConfig, summary, train_at


class TrainAtJob(TrainAtConfig):
    """Fine-tune one classifier."""


def work(config: TrainAtJob) -> TrainResult:
    """Train, print the summary, and return the result."""
    result = train_at(config)
    print(summary(result))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(TrainAtJob, work, argv)
