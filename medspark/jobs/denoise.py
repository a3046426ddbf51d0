"""Train a denoiser and a detector of attacked images for a trained model, and keep them with it.

Reads   a trained model's folder and the shards that jobs/shard.py wrote
Writes  the guarded model with its guard, the result as JSON, and one MLflow run

    spark-submit jobs/denoise.py --model RUN/model --shards SHARDS

To resume an interrupted training, give the same command with --run_dir RUN --resume auto.

The method is a reconstruction of Yin et al. (arXiv 2306.07992), whose losses could not be read.
The guarded model is a model: evaluate, detect, export_edge and train_at take it.
"""

from __future__ import annotations

from collections.abc import Sequence

from medspark.defend.denoise.result import DenoiseResult
from medspark.job import run_job
from medspark.workflows.denoise import DenoiseAtConfig, denoise
from medspark.workflows.train_at import summary


class DenoiseJob(DenoiseAtConfig):
    """Guard one model."""


def work(config: DenoiseJob) -> DenoiseResult:
    """Train the denoiser, print the summary, and return the result."""
    result = denoise(config)
    print(summary(result), *result.more_lines(), sep="\n")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(DenoiseJob, work, argv)
