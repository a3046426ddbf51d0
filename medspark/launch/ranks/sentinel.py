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
from types import FrameType
from typing import NoReturn, Protocol

from medspark.launch.ranks.reports import Kind

__all__ = ["Witness", "watch"]

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class Witness(Protocol):
    """Records how a rank is, where the rank cannot report it itself."""

    def ended(self, kind: Kind, cause: str) -> None:
        """The rank has ended."""

    def stopped(self, is_stopped: bool, /) -> None:
        """The rank's process was stopped, or goes on."""


def watch(work: Callable[[], None], *, witness: Witness) -> int:
    """Do ``work`` in a child process and return its exit status.

    The child dies with this process, however that ends, and with the agent above it. Has to be
    called before anything starts a thread, as only this thread is copied.
    """
    agent, here = os.getppid(), os.getpid()
    child = os.fork()
    if child == 0:
        _become(work, parent=here)
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
    """Ends the child, even a stopped one, when the agent asks this process to end."""

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
        # Not past this point: the rest of torchrun's script belongs to the other process.
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
