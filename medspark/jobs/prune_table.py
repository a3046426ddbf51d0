"""Prune models by several methods to several sparsities, attack them, and make one table.

Reads   trained models' folders and the shards that jobs/shard.py wrote
Writes  the table (Markdown, CSV, figure), the result as JSON, and one MLflow run with a child run
        for each pruning

    spark-submit jobs/prune_table.py --models.resnet18 RUN/model --shards SHARDS --sparsities 0,.85

The exit status is 0 if every cell finished. Otherwise it is 1, the message names the failed cells,
and the table shows the others. To resume, give the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medspark.job import command_line, run_job
from medspark.workflows.prune_table_config import PruneTableConfig


class PruneTableJob(PruneTableConfig):
    """Fill one table."""


def work(config: PruneTableJob) -> dict[str, Any]:
    """Fill the table, print it, and return the result."""
    from medspark.workflows.prune_table import prune_table  # matplotlib: not for --help

    result = prune_table(config, command=command_line())
    print(Path(result["table"]).read_text(encoding="utf-8"))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(PruneTableJob, work, argv)
