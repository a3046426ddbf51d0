"""Run the paper's experiment: train and attack networks x datasets x trainings, make one table.

Reads   shards that jobs/shard.py wrote, or built-in synthetic data
Writes  the table (Markdown, CSV, PNG), every network, the result as JSON, and one MLflow run with
        a child run for each cell

    spark-submit jobs/paper_table.py --config conf/jobs/paper_table.yaml --datasets.NAME SHARDS

The exit status is 0 if every cell finished. Otherwise it is 1, the message names the failed cells,
and the table shows the others. All finished cells are kept. To resume, give the same command again:
it runs only unfinished and failed cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medspark.job import run_job
from medspark.workflows.paper_plan import PaperTableConfig


class PaperTableJob(PaperTableConfig):
    """Fill one table."""


def work(config: PaperTableJob) -> dict[str, Any]:
    """Fill the table, print it, and return the result."""
    from medspark.workflows.paper_table import paper_table  # torch: not for --help

    result = paper_table(config)
    print(Path(result["table"]).read_text(encoding="utf-8"))
    if config.evaluate.gallery:
        print(
            "Images of patients are in the reports, and with them in MLflow; "
            "--evaluate.gallery 0 leaves them out."
        )
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(PaperTableJob, work, argv)
