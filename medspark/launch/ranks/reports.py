"""What each rank leaves in the folder of its attempt, and what the driver concludes from it.

TorchDistributor itself only says "failed during training"; these files name the rank and the cause.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from medspark.config import Config
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

# Which of several bad ends is the cause and which the consequence, the cause first.
_BLAME: tuple[Kind, ...] = ("error", "killed", "agent_lost")
_PEERS = re.compile(
    r"gloo/transport|connection (closed|reset)|broken pipe|DistNetworkError|DistStoreError"
    r"|DistBackendError|NCCL|timed out (after|waiting)|socket timeout",
    re.IGNORECASE,
)
_NEVER_BEGAN = (
    "rank {rank} never began, while others did: its machine cannot import torch, or does not share "
    "run_dir with the driver"
)
_STOPPED = "stopped answering: the process was stopped (SIGSTOP)"
_GONE = "was killed (SIGKILL) together with the process that watched it, or its machine was lost"
# These fail again however often they are tried.
_HOPELESS = ("UsageError", "RunError", "ImportError", "ModuleNotFoundError", "ValidationError")


class Started(Config):
    """A rank that has begun: where, as which process, with how many threads."""

    rank: int
    host: str
    pid: int
    sentinel: int
    nonce: str
    threads: int
    interface: str
    time: float


class Ended(Config):
    """How a rank ended; ``error`` is the class of the exception and ``cause`` one line."""

    rank: int
    kind: Kind
    time: float
    error: str = ""
    cause: str = ""
    traceback: str = ""


class Failure(Config):
    """Why an attempt failed: the rank to blame, if one is, and one sentence."""

    rank: int | None
    sentence: str
    error: str = ""
    traceback: str = ""

    @property
    def hopeless(self) -> bool:
        """Whether another attempt would fail in the same way."""
        return self.error in _HOPELESS

    @property
    def port_taken(self) -> bool:
        """Whether somebody took the rendezvous port between its choice and its use."""
        return "EADDRINUSE" in self.traceback or "address already in use" in self.traceback.lower()


class Reports:
    """The files of one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def result(self) -> Path:
        """Where rank 0 writes the result: the attempt has succeeded when it is there."""
        return self.folder / "result.json"

    def log(self, rank: int) -> Path:
        """Where the rank's output goes."""
        return self.folder / f"rank-{rank}.log"

    def start(self, report: Started) -> None:
        """Write that a rank has begun."""
        write_whole(self.folder / f"rank-{report.rank}.started.json", report.model_dump_json())

    def end(self, report: Ended) -> None:
        """Write how a rank ended."""
        write_whole(self.folder / f"rank-{report.rank}.json", report.model_dump_json(indent=1))

    def stop(self, rank: int, *, stopped: bool) -> None:
        """Write that a rank's process was stopped, or that it goes on."""
        note = self.folder / f"rank-{rank}.stopped"
        if stopped:
            note.touch()
        else:
            note.unlink(missing_ok=True)

    def is_stopped(self, rank: int) -> bool:
        """Return whether a rank's process was last seen stopped."""
        return (self.folder / f"rank-{rank}.stopped").exists()

    def end_leftovers(self) -> None:
        """Kill what is left of the attempt on this machine, even processes that are stopped.

        Whatever the files say, a process that does not carry the attempt's mark is let alone.
        """
        for report in self.started().values():
            if report.host == socket.gethostname():
                mark = mark_of(self.folder, report.nonce)
                end(report.sentinel, mark)
                end(report.pid, mark)

    def started(self) -> dict[int, Started]:
        """Return the ranks that have begun."""
        found = (_read(Started, path) for path in self.folder.glob("rank-*.started.json"))
        return {report.rank: report for report in found if report is not None}

    def ended(self) -> dict[int, Ended]:
        """Return the ranks that have ended."""
        names = (path for path in self.folder.glob("rank-*.json") if path.name.count(".") == 1)
        found = (_read(Ended, path) for path in names)
        return {report.rank: report for report in found if report is not None}


def lost_its_peers(error: BaseException) -> bool:
    """Return whether ``error`` says that another rank went away, rather than what went wrong."""
    return bool(_PEERS.search(f"{type(error).__name__}: {error}"))


def diagnose(reports: Reports, processes: int, error: BaseException | None) -> Failure:
    """Return why the attempt failed; ``error`` is what TorchDistributor raised, if it did."""
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


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all at once."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def end_now(rank: int, kind: Kind, cause: str = "") -> Ended:
    """Return a report of an end at this moment."""
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
        f"no rank began: either the workers cannot import torch, or {reports.folder} is not on "
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
