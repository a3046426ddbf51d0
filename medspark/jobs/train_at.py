"""Fine-tune a classifier against adversarial examples made on the fly, one process per device.

Reads   the shards that jobs/shard.py wrote; without --shards, built-in demo data
Writes  the model, the result as JSON, and one MLflow run per training

    spark-submit jobs/train_at.py --shards SHARDS --model.name mobilenetv2_100 --launch.processes 2
"""

from __future__ import annotations

from collections.abc import Sequence

from medspark.job import run_job
from medspark.train.result import TrainResult
from medspark.workflows.train_at import TrainAtConfig, summary, train_at


class TrainAtJob(TrainAtConfig):
    """Fine-tune one classifier."""


def work(config: TrainAtJob) -> TrainResult:
    """Train, print what came of it, and return it."""
    result = train_at(config)
    print(summary(result))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(TrainAtJob, work, argv)
