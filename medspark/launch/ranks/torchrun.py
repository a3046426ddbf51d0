"""Start the ranks through TorchDistributor and torchrun, without any listening port.

By default the driver prints everything that is sent to a port on all its interfaces, and torchrun's
agents unpickle data from a store on another port. Here each agent is alone: it starts the rank of
its task, or all ranks of this machine, and its store is a private file.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pyspark.ml.torch.distributor import TorchDistributor

from medspark.launch.ranks.process_mark import MARK
from medspark.launch.ranks.rank import Order
from medspark.launch.ranks.rendezvous import pass_on

__all__ = ["WRAPPER", "QuietDistributor"]

# PySpark's wrapper, which ends torchrun when its parent (Spark's worker or the driver) is gone.
WRAPPER = "pyspark.ml.torch.torch_run_process_wrapper"
_END_SECONDS = 10.0


class QuietDistributor(TorchDistributor):
    """A TorchDistributor whose agents and driver open no port, and whose logs are files."""

    def start(self, order: Order, function: Callable[..., None], *args: Any) -> None:
        """Run ``function(*args)`` as every rank, and return when all have ended.

        It returns normally even if ranks failed: TorchDistributor does not report that.
        """
        self.logger.setLevel(logging.WARNING)
        # PySpark's DeepspeedTorchDistributor replaces the command line in the same way.
        self._run(function, partial(_start_agent, order), *args)

    def _run_distributed_training(
        self,
        framework_wrapper_fn: Callable[..., Any],
        train_object: Callable[..., Any] | str,
        run_pytorch_file_fn: Callable[..., Any] | None,
        spark_dataframe: object,  # noqa: ARG002 - always None: only this class calls it
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Run one barrier task per rank, as the base class does, but without a log server."""
        self._check_encryption()
        self.driver_address, self.log_streaming_server_port = "", -1
        work = self._get_spark_task_function(
            framework_wrapper_fn, train_object, run_pytorch_file_fn, None, *args, **kwargs
        )
        tasks = self.spark.range(0, self.num_tasks, numPartitions=self.num_tasks)
        tasks.mapInArrow(work, schema="chunk binary", barrier=True).collect()


def _start_agent(order: Order, given: dict[str, Any], script: str, *_: Any) -> None:
    """Run ``script``, which lies in a private folder of TorchDistributor, under a torchrun agent.

    The driver calls this for all ranks of this machine, or a Spark task for its single rank.
    """
    folder = Path(script).parent
    is_local = bool(given["local_mode"])
    command = _command(folder, script, ranks=given["num_processes"] if is_local else 1)
    environment = os.environ | _environment(order) | ({} if is_local else pass_on(os.environ))
    number = 0 if is_local else int(os.environ["RANK"])
    with open(order.folder / f"torchrun-{number}.log", "wb") as log:
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            agent.wait()
        finally:
            _end(agent)


def _command(folder: Path, script: str, *, ranks: int) -> list[str]:
    return [
        *(sys.executable, "-m", WRAPPER, "--nnodes=1", f"--nproc_per_node={ranks}"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint={folder / 'agent'}"),
        *("--rdzv_conf=store_type=file", script),
    ]


def _environment(order: Order) -> dict[str, str]:
    return {
        MARK: order.mark,
        "OMP_NUM_THREADS": str(order.threads),
        # Without it the agent opens a TCP store for its ranks on all interfaces.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # A byte that is not UTF-8 in a rank's output would end the job.
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        # Without it the last lines of a killed process are lost.
        "PYTHONUNBUFFERED": "1",
        # torch's C++ log repeats what medspark reports.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End an agent that still runs because the wait for it was interrupted."""
    if agent.poll() is None:
        agent.terminate()
        try:
            agent.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            agent.kill()
