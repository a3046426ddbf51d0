"""Train a student from a trained teacher, to compress the teacher or to transfer its robustness.

Reads   the shards that jobs/shard.py wrote, and the teacher's model folder
Writes  the student's model, the result as JSON, and one MLflow run

    spark-submit jobs/distill.py --shards SHARDS --distill.teacher RUN/model --distill.method kd

To resume an interrupted training, give the same command with --run_dir RUN --resume auto.

--distill.method defensive needs a teacher that was trained at the same temperature:
train_at with --train.mode standard --train.temperature 50 (Papernot et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from medspark.job import run_job
from medspark.models.card import read_card
from medspark.train.config import DistillConfig
from medspark.train.result import TrainResult
from medspark.workflows.train_at import TrainAtConfig, summary, train_at


class DistillJob(TrainAtConfig):
    """Train one student."""

    decides_weights: ClassVar = frozenset({"distill"})

    distill: DistillConfig


def work(config: DistillJob) -> TrainResult:
    """Train the student, print the summary, and return the result."""
    read_card(config.distill.teacher)
    # Each rank works in a different folder, so the path must be absolute.
    teacher = config.distill.model_copy(update={"teacher": config.distill.teacher.resolve()})
    result = train_at(config.model_copy(update={"distill": teacher}))
    print(summary(result))
    if result.warning is not None:
        print(f"\nWarning: {result.warning}")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(DistillJob, work, argv)
