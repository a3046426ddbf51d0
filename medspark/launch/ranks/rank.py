"""Run one rank: report its start, join the others, work, report its end."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pkgutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medspark.config import Config
from medspark.errors import RunError, UsageError
from medspark.files import write_whole as write
from medspark.launch.ranks.network import choose_interface
from medspark.launch.ranks.process_mark import mark_of
from medspark.launch.ranks.rendezvous import is_spread, open_store, take_over
from medspark.launch.ranks.reports import Ended, Kind, Reports, Started, end_now, lost_its_peers
from medspark.launch.ranks.sentinel import watch
from medspark.memory import keep_freed_memory
from medspark.track.journal import Journal

__all__ = ["NONCE", "Order", "main"]

NONCE = "nonce"


class Order(Config):
    """The driver's order to every rank, sent as JSON."""

    function: str  # module:name of a function of (config, world, journal)
    config_class: str  # module:name of the class of its configuration
    config: dict[str, Any]
    folder: Path  # of this attempt
    journal: Path
    nonce: str
    threads: int
    timeout_seconds: float
    alone: bool = False  # a single rank without a process group

    @property
    def mark(self) -> str:
        """The mark that every process of the attempt carries."""
        return mark_of(self.folder, self.nonce)


def main(order: dict[str, Any]) -> None:
    """Run the driver's ``order`` as the rank given by the environment (RANK)."""
    chosen = Order.model_validate(order)
    take_over()
    reports, rank = Reports(chosen.folder), int(os.environ["RANK"])
    _check_shared(chosen)
    _end_earlier_attempts(chosen.folder)
    sentinel = os.getpid()

    def work() -> None:
        _work(chosen, reports, rank, sentinel)

    status = watch(work, witness=_Witness(reports, rank))
    if status != 0:
        sys.exit(f"rank {rank} ended with status {status}: see {chosen.folder}")


class _Witness:
    """Reports to the driver what the sentinel observes."""

    def __init__(self, reports: Reports, rank: int) -> None:
        self._reports = reports
        self._rank = rank

    def ended(self, kind: Kind, cause: str) -> None:
        """Write that the rank has ended."""
        self._reports.end(end_now(self._rank, kind, cause))

    def stopped(self, is_stopped: bool, /) -> None:
        """Write that the rank's process was stopped, or continued."""
        self._reports.stop(self._rank, stopped=is_stopped)


def _work(order: Order, reports: Reports, rank: int, sentinel: int) -> None:
    _redirect_output(reports.log(rank), rank)
    interface = _set_environment(order)
    started = Started(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        sentinel=sentinel,
        nonce=order.nonce,
        threads=order.threads,
        interface=interface,
        time=time.time(),
    )
    reports.start(started)
    logging.getLogger(__name__).info("rank %d: %s", rank, started)
    try:
        _run(order, reports)
    except BaseException as error:  # report it to the driver, then end the rank
        reports.end(_describe(rank, error))
        raise
    reports.end(end_now(rank, "ok"))


def _run(order: Order, reports: Reports) -> None:
    # Imported after the environment is set: torch reads the number of threads on import.
    import torch

    from medspark.train.world import join

    keep_freed_memory()
    torch.set_num_threads(order.threads)
    function: Callable[..., dict[str, Any]] = pkgutil.resolve_name(order.function)
    config = pkgutil.resolve_name(order.config_class).model_validate(order.config)
    # TorchDistributor's script lies in a private folder, which is removed after the attempt.
    private = Path(sys.argv[0]).resolve().parent
    store = None if order.alone else open_store(private, timeout_s=order.timeout_seconds)
    with join(timeout_s=order.timeout_seconds, alone=order.alone, store=store) as world:
        with Journal(order.journal if world.is_main else None) as journal:
            result = function(config, world, journal)
        world.barrier()
        if world.is_main:
            # Before the process group is destroyed, which can fail although the work is done.
            write(reports.result, json.dumps(result, default=str))


def _check_shared(order: Order) -> None:
    try:
        nonce = (order.folder / NONCE).read_text(encoding="utf-8")
    except OSError:
        nonce = ""
    if nonce != order.nonce:
        raise UsageError(
            f"{order.folder} on {socket.gethostname()} is not the driver's folder: run_dir must "
            "be a folder that all ranks share."
        )


def _end_earlier_attempts(folder: Path) -> None:
    """Kill processes of earlier attempts on this machine, which the driver cannot reach."""
    for earlier in folder.parent.iterdir():
        if earlier.name < folder.name:
            Reports(earlier).end_leftovers()


def _set_environment(order: Order) -> str:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(order.threads)
    interface = choose_interface(os.environ["MASTER_ADDR"] if is_spread() else "localhost")
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        if not is_spread():
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    return interface


def _redirect_output(path: Path, rank: int) -> None:
    """Redirect this process's output to its log: the driver prints only the result."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        force=True,
    )


def _describe(rank: int, error: BaseException) -> Ended:
    lines = traceback.format_exception(error)
    explained = isinstance(error, UsageError | RunError)
    return Ended(
        rank=rank,
        kind="lost_peers" if lost_its_peers(error) and not explained else "error",
        time=time.time(),
        error=type(error).__name__,
        cause=str(error) if explained else " ".join(lines[-1].split()),
        traceback="" if explained else "".join(lines),
    )
