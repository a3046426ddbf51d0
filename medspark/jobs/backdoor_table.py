"""Attack a federation with backdoors: adversaries x aggregation rules, make one table.

Reads   shards that jobs/shard.py wrote, or built-in synthetic data
Writes  the table (Markdown, HTML, CSV), figures of success over the rounds, the result as JSON, and
        one MLflow run with a child run for each cell

    spark-submit jobs/backdoor_table.py --config conf/jobs/backdoor_table.yaml

The exit status is 0 if every cell finished. Otherwise it is 1, the message names the failed cells,
and the table shows the others. All finished cells are kept. To resume, give the same command again:
it runs only unfinished and failed cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medspark.job import command_line, run_job
from medspark.workflows.backdoor_plan import BackdoorTableConfig


class BackdoorTableJob(BackdoorTableConfig):
    """Fill one table."""


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""

    def work(config: BackdoorTableJob) -> dict[str, Any]:
        from medspark.workflows.backdoor_table import backdoor_table  # torch: not for --help

        command = command_line()
        result = backdoor_table(config, command=command)
        print(Path(result["table_md"]).read_text(encoding="utf-8"))
        return result

    return run_job(BackdoorTableJob, work, argv)
