"""Compare recipes of training at equal time, choose one on validation images, and test it once.

Reads   one or more folders of shards that jobs/shard.py wrote
Writes  the table (Markdown, CSV, figure), every network, the result as JSON, and one MLflow run
        with a child run for each cell

    spark-submit jobs/recipe_table.py --config conf/jobs/recipe_table.yaml --shards.NAME SHARDS \\
        --recipes.wd.train.weight_decay 0.1

Every recipe is screened with one seed on validation images. The best ones and the default are
trained with all seeds, and attacked on test images once. The choice uses validation images alone.

The exit status is 0 if every cell finished. Otherwise it is 1, the message names the failed cells,
and the table shows the others. To resume, give the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medspark.job import command_line, run_job
from medspark.workflows.recipe_config import RecipeTableConfig

if TYPE_CHECKING:
    from medspark.study.recipe_report import RecipeTableResult


class RecipeTableJob(RecipeTableConfig):
    """Fill one table."""


def work(config: RecipeTableJob) -> RecipeTableResult:
    """Fill the table, print it, and return the result."""
    from medspark.workflows.recipe_table import recipe_table  # torch: not for --help

    result = recipe_table(config, command=command_line())
    print(Path(result.table).read_text(encoding="utf-8"))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(RecipeTableJob, work, argv)
