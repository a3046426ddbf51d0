"""Train the same thing at many scales: processes, shares of the data, networks, ways to train.

Reads   the shards that jobs/shard.py wrote; without --shards, built-in demo data
Writes  one MLflow run with a child for every cell, the table, the figures and one HTML report

    spark-submit jobs/scale_at.py --shards SHARDS --grid.processes 1,2 --grid.data 0.1,0.3,1.0 \
        --grid.mode standard,fused_noise --repeats 3
    spark-submit jobs/scale_at.py --compare SWEEP SWEEP

The same command again runs only the cells that are not finished. The status is 0 if every cell
came to its end, else 1: the message says which failed, and the report has all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medspark.job import run_job
from medspark.workflows.scale_grid import ScaleAtConfig


class ScaleAtJob(ScaleAtConfig):
    """Train at many scales."""


def work(config: ScaleAtJob) -> dict[str, Any]:
    """Run the sweep, print what came of it, and return it."""
    from medspark.workflows.scale_at import scale_at, summary_text  # torch: not for --help

    result = scale_at(config)
    print(summary_text(result))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(ScaleAtJob, work, argv)
