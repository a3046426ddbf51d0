"""Train one network with many clients that share no image, and aggregate their updates.

Reads   the shards that jobs/shard.py wrote
Writes  the model, a report on rounds and clients, the result as JSON, and one MLflow run

    spark-submit jobs/federate.py --shards SHARDS --clients.by patient --rounds 20 \\
        --clients.per_round 10 --train.mode fused_noise --aggregate median

Clients train in Spark tasks. Only updates leave a client. A client that fails, hangs or sends
unusable numbers is left out of the round and named. To resume a federation that was killed, give
the same command with --resume auto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medspark.job import run_job
from medspark.workflows.federate_config import FederateConfig

if TYPE_CHECKING:
    from medspark.federate.result import FederationResult


def work(config: FederateConfig) -> FederationResult:
    """Run the federation, print the table, and return the result."""
    from medspark.workflows.federate import federate  # torch: not for --help
    from medspark.workflows.federate_report import summary

    result = federate(config)
    print(summary(result))
    return result


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    return run_job(FederateConfig, work, argv)
