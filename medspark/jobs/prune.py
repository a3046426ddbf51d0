"""Prune a trained model while it is fine-tuned on attacked images, so that it stays robust.

Reads   a trained model's folder and the shards that jobs/shard.py wrote
Writes  the pruned model, the result as JSON, and one MLflow run

    spark-submit jobs/prune.py --model RUN/model --shards SHARDS --method rsr --sparsity 0.85

To resume an interrupted pruning, give the same command with --run_dir RUN --resume auto.

--structured removes whole channels, which makes the network faster; zeros alone do not.
"""

from __future__ import annotations

from collections.abc import Sequence

from medspark.evaluate.noise_result import noise_lines
from medspark.job import run_job
from medspark.train.result import TrainResult
from medspark.workflows.prune import PruneAtConfig, prune
from medspark.workflows.train_at import summary


class PruneJob(PruneAtConfig):
    """Prune one model."""


def work(config: PruneJob) -> TrainResult:
    """Prune the model, print the summary, and return the result."""
    result = prune(config)
    print(summary(result))
    if result.noise is not None:
        print("", *noise_lines(result.noise), sep="\n")
    print(f"\n{100 * (result.sparsity or 0):.1f} % of the weights are zero", end="")
    print(f"; {100 * (result.multiply_adds_removed or 0):.1f} % of the multiply-adds are gone.")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(PruneJob, work, argv)
