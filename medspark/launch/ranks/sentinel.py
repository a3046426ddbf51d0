"""The sentinel: a small process between torchrun and a rank, which reports how the rank ended.

A killed rank cannot report its end. A rank whose torchrun agent is killed would continue to train
unnoticed, and the other ranks would wait 300 seconds in torch's exit barrier.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, Protocol

from medspark.launch.ranks.reports import Kind

__all__ = ["Witness", "watch"]

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class Witness(Protocol):
    """Records events that the rank cannot report itself."""

    def ended(self, kind: Kind, cause: str) -> None:
        """Record that the rank has ended."""

    def stopped(self, is_stopped: bool, /) -> None:
        """Record that the rank's process was stopped, or continued."""


def watch(work: Callable[[], None], *, witness: Witness) -> int:
    """Do ``work`` in a child process and return its exit status.

    The child dies with this process, and with the agent above it, even if these are killed. Call
    this before any thread is started: fork copies only the calling thread.
    """
    agent, sentinel = os.getppid(), os.getpid()
    child = os.fork()
    if child == 0:
        _become(work, parent=sentinel)
    signal.signal(signal.SIGTERM, _Terminated(child, witness))
    while True:
        changed, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if changed and (os.WIFSTOPPED(status) or os.WIFCONTINUED(status)):
            witness.stopped(os.WIFSTOPPED(status))
        elif changed:
            return _conclude(status, witness)
        if os.getppid() != agent:
            os.kill(child, signal.SIGKILL)
            witness.ended("agent_lost", "lost the torchrun agent above it, which was killed")
            os._exit(1)
        time.sleep(_POLL_SECONDS)


class _Terminated:
    """Kills the child, even a stopped one, when the agent sends SIGTERM to this process."""

    def __init__(self, child: int, witness: Witness) -> None:
        self._child = child
        self._witness = witness

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG002
        os.kill(self._child, signal.SIGKILL)
        self._witness.ended("terminated", "was ended after another rank had failed")
        os._exit(128 + signal.SIGTERM)


def _become(work: Callable[[], None], *, parent: int) -> NoReturn:
    _die_with(parent)
    status = 1
    try:
        work()
        status = 0
    finally:
        # Exit here: the rest of torchrun's script belongs to the parent.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _conclude(status: int, witness: Witness) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        witness.ended("killed", f"was killed by {signal.Signals(-code).name}")
    return code


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
