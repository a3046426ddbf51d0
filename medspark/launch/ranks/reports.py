"""Reports that ranks write to the folder of their attempt, and the driver's diagnosis from them.

TorchDistributor only says "failed during training". These files name the rank and the cause.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from medspark.config import Config
from medspark.files import write_whole
from medspark.launch.ranks.process_mark import end, mark_of

__all__ = [
    "Ended",
    "Failure",
    "Kind",
    "Reports",
    "Started",
    "diagnose",
    "lost_its_peers",
]

Kind = Literal["ok", "error", "killed", "agent_lost", "terminated", "lost_peers"]

R = TypeVar("R", bound=Config)

# Bad ends that cause others, the most likely cause first. All other kinds are consequences.
_BLAME: tuple[Kind, ...] = ("error", "killed", "agent_lost")
_PEERS = re.compile(
    r"gloo/transport|connection (closed|reset)|broken pipe|DistNetworkError|DistStoreError"
    r"|DistBackendError|NCCL|timed out (after|waiting)|socket timeout",
    re.IGNORECASE,
)
_NEVER_BEGAN = (
    "rank {rank} did not start, while others did: its machine cannot import torch, or does not "
    "share run_dir with the driver"
)
_STOPPED = "stopped answering: the process was stopped (SIGSTOP)"
_GONE = "was killed (SIGKILL) together with its watching process, or its machine was lost"
# Errors that fail again on every attempt.
_HOPELESS = ("UsageError", "RunError", "ImportError", "ModuleNotFoundError", "ValidationError")


class Started(Config):
    """A rank that has started: its host, processes, threads and network interface."""

    rank: int
    host: str
    pid: int
    sentinel: int
    nonce: str
    threads: int
    interface: str
    time: float


class Ended(Config):
    """How a rank ended. ``error`` is the exception's class, ``cause`` is one line."""

    rank: int
    kind: Kind
    time: float
    error: str = ""
    cause: str = ""
    traceback: str = ""


class Failure(Config):
    """Why an attempt failed: one sentence, and the rank that caused it, if one did."""

    rank: int | None
    sentence: str
    error: str = ""
    traceback: str = ""

    @property
    def hopeless(self) -> bool:
        """Whether another attempt would fail again."""
        return self.error in _HOPELESS

    @property
    def port_taken(self) -> bool:
        """Whether another process took the rendezvous port before rank 0 could use it."""
        return "EADDRINUSE" in self.traceback or "address already in use" in self.traceback.lower()


class Reports:
    """The files of one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def result(self) -> Path:
        """The path of rank 0's result. The attempt has succeeded once this file exists."""
        return self.folder / "result.json"

    def log(self, rank: int) -> Path:
        """Return the path of the rank's output."""
        return self.folder / f"rank-{rank}.log"

    def start(self, report: Started) -> None:
        """Write that a rank has started."""
        write_whole(self.folder / f"rank-{report.rank}.started.json", report.model_dump_json())

    def end(self, report: Ended) -> None:
        """Write how a rank ended."""
        write_whole(self.folder / f"rank-{report.rank}.json", report.model_dump_json(indent=1))

    def stop(self, rank: int, *, stopped: bool) -> None:
        """Write that a rank's process was stopped, or continued."""
        note = self.folder / f"rank-{rank}.stopped"
        if stopped:
            note.touch()
        else:
            note.unlink(missing_ok=True)

    def is_stopped(self, rank: int) -> bool:
        """Return whether a rank's process was last seen stopped."""
        return (self.folder / f"rank-{rank}.stopped").exists()

    def end_leftovers(self) -> None:
        """Kill the attempt's remaining processes on this machine, even stopped ones.

        A process that does not carry the attempt's mark is never killed.
        """
        for report in self.started().values():
            if report.host == socket.gethostname():
                mark = mark_of(self.folder, report.nonce)
                end(report.sentinel, mark)
                end(report.pid, mark)

    def started(self) -> dict[int, Started]:
        """Return the reports of the ranks that have started, by rank."""
        reports = (_read(Started, path) for path in self.folder.glob("rank-*.started.json"))
        return {report.rank: report for report in reports if report is not None}

    def ended(self) -> dict[int, Ended]:
        """Return the reports of the ranks that have ended, by rank."""
        paths = (path for path in self.folder.glob("rank-*.json") if path.name.count(".") == 1)
        reports = (_read(Ended, path) for path in paths)
        return {report.rank: report for report in reports if report is not None}


def lost_its_peers(error: BaseException) -> bool:
    """Return whether ``error`` is a lost connection to another rank, so not the root cause."""
    return bool(_PEERS.search(f"{type(error).__name__}: {error}"))


def diagnose(reports: Reports, processes: int, error: BaseException | None) -> Failure:
    """Return why the attempt failed. ``error`` is TorchDistributor's exception, or None."""
    started, ended = reports.started(), reports.ended()
    if not started:
        return _never_started(reports, error)
    stopped = [rank for rank in range(processes) if reports.is_stopped(rank)]
    culprit = None if stopped else _blame(list(ended.values()))
    if culprit is not None:
        return _failure(culprit, started)
    silent = stopped or [rank for rank in range(processes) if rank not in ended]
    if silent:
        return _silent(silent[0], started, stopped=bool(stopped))
    lost = sorted(ended.values(), key=lambda report: report.time)[0]
    return _failure(lost, started)


def end_now(rank: int, kind: Kind, cause: str = "") -> Ended:
    """Return a report of an end with the current time."""
    return Ended(rank=rank, kind=kind, time=time.time(), cause=cause)


def _blame(ended: Sequence[Ended]) -> Ended | None:
    guilty = [report for report in ended if report.kind in _BLAME]
    return min(guilty, key=lambda r: (_BLAME.index(r.kind), r.time), default=None)


def _failure(report: Ended, started: dict[int, Started]) -> Failure:
    return Failure(
        rank=report.rank,
        sentence=f"{_name(report.rank, started)} {_verb(report)}",
        error=report.error,
        traceback=report.traceback,
    )


def _verb(report: Ended) -> str:
    if report.kind == "error":
        return f"raised {report.cause}"
    if report.kind == "lost_peers":
        return f"lost its connection to the other ranks: {report.cause}"
    return report.cause


def _silent(rank: int, started: dict[int, Started], *, stopped: bool) -> Failure:
    if rank not in started:
        return Failure(rank=rank, sentence=_NEVER_BEGAN.format(rank=rank))
    what = _STOPPED if stopped else _GONE
    return Failure(rank=rank, sentence=f"{_name(rank, started)} {what}")


def _never_started(reports: Reports, error: BaseException | None) -> Failure:
    text = str(error).strip() if error is not None else ""
    sentence = (
        f"no rank started: either the workers cannot import torch, or {reports.folder} is not on "
        "storage that they share with the driver"
    )
    return Failure(rank=None, sentence=sentence, traceback=text)


def _name(rank: int, started: dict[int, Started]) -> str:
    report = started.get(rank)
    return f"rank {rank} on {report.host} (process {report.pid})" if report else f"rank {rank}"


def _read(cls: type[R], path: Path) -> R | None:
    try:
        return cls.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
