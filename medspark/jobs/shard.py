"""Turn samples into training shards of decoded pixels, split by patient, shuffled, of equal size.

Reads   the sample dataset --samples that jobs/ingest.py wrote
Writes  the training shards --shards (Parquet and a manifest), the result as JSON and, if --table
        names one, a table of what the shards hold, without pixels

    spark-submit jobs/shard.py --samples IN --shards OUT

The same command, given again, makes all shards anew and replaces the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from medspark.job import JobConfig, run_job
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.sharding.shard_table import publish_shards
from medspark.spark.session import SparkConfig, spark_session
from medspark.spark.table import TableConfig, check_table


class ShardJob(JobConfig, ShardConfig, TableConfig):
    """Make training shards of one sample dataset."""

    spark: SparkConfig = Field(default_factory=SparkConfig)


def work(config: ShardJob) -> dict[str, Any]:
    """Make the shards, print the counts of each split, and return the result."""
    manifest = open_samples(config)
    with spark_session(config.spark, name="medspark shard") as spark:
        if config.table is not None:
            check_table(spark, config.table, "shards")
        result = make_shards(spark, config, manifest)
        if config.table is not None:
            publish_shards(spark, config.shards, config.table)
            result |= {"table": config.table}
    print(_summary(result))
    return result


def _summary(result: dict[str, Any]) -> str:
    lines = [f"{'split':>8} {'images':>9} {'patients':>9} {'files':>6}  {result['classes']}"]
    for name, split in result["splits"].items():
        counts = ", ".join(map(str, split["class_counts"]))
        lines.append(
            f"{name:>8} {split['rows']:>9} {split['patients']:>9} {split['shards']:>6}  [{counts}]"
        )
    return "\n".join([*lines, f"digest {result['digest']}"])


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(ShardJob, work, argv)
