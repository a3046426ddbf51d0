"""A small process between torchrun and a rank, which outlives the rank and says how it ended.

A rank that is killed cannot say so, and one whose torchrun agent is killed would train on unseen
and leave the others in torch's exit barrier for 300 seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from medspark.launch.reports import Kind

__all__ = ["Watched", "watch"]

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1

# Called with how the rank ended when it could not say so itself.
Watched = Callable[[Kind, str], None]


def watch(work: Callable[[], None], *, ended: Watched) -> int:
    """Do ``work`` in a child process and return its exit status.

    The child dies with this process, however that ends, and with the agent above it. Has to be
    called before anything starts a thread, as only this thread is copied.
    """
    agent = os.getppid()
    child = os.fork()
    if child == 0:
        _become(work, parent=os.getppid())
    signal.signal(signal.SIGTERM, _Terminated(child, ended))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _conclude(status, ended)
        if os.getppid() != agent:
            _kill(child, ended, "agent_lost", "lost the torchrun agent above it, which was killed")
            os._exit(1)
        time.sleep(_POLL_SECONDS)


class _Terminated:
    """Ends the child, even a stopped one, when the agent asks this process to end."""

    def __init__(self, child: int, ended: Watched) -> None:
        self._child = child
        self._ended = ended

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG002
        _kill(self._child, self._ended, "terminated", "was ended after another rank had failed")
        os._exit(128 + signal.SIGTERM)


def _become(work: Callable[[], None], *, parent: int) -> NoReturn:
    _die_with(parent)
    status = 1
    try:
        work()
        status = 0
    finally:
        # Not past this point: the rest of torchrun's script belongs to the other process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _conclude(status: int, ended: Watched) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        ended("killed", f"was killed by {signal.Signals(-code).name}")
    return code


def _kill(child: int, ended: Watched, kind: Kind, cause: str) -> None:
    if _is_stopped(child):
        kind, cause = "stopped", "stopped answering: the process was stopped (SIGSTOP)"
    os.kill(child, signal.SIGKILL)
    ended(kind, cause)


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "T"


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_poll, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _poll(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
