"""Train at many scales (processes, data shares, networks, training modes) and compare.

Reads   the shards that jobs/shard.py wrote; without --shards, built-in demo data
Writes  one MLflow run with a child run for each cell, the table, the figures, one HTML report, and
        the result as JSON

    spark-submit jobs/scale_at.py --shards SHARDS --grid.processes 1,2 --grid.data 0.1,0.3,1.0 \\
        --grid.mode standard,fused_noise --repeats 3
    spark-submit jobs/scale_at.py --compare SWEEP SWEEP

The exit status is 0 if every cell finished. Otherwise it is 1, the message names the failed cells,
and the report shows the others. All finished cells are kept. To resume, give the same command
again: it runs only unfinished and failed cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medspark.job import run_job
from medspark.workflows.scale_grid import ScaleAtConfig


class ScaleAtJob(ScaleAtConfig):
    """Train at many scales."""


def work(config: ScaleAtJob) -> dict[str, Any]:
    """Run the sweep, print the summary, and return the result."""
    from medspark.workflows.scale_at import scale_at, summary_text  # torch: not for --help

    result = scale_at(config)
    print(summary_text(result))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(ScaleAtJob, work, argv)
