"""Recognise the processes of an attempt by a mark in their environment.

A process id from a file proves nothing: the file may be wrong, and the id may have been reused.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["MARK", "belongs", "end", "mark_of"]

# The environment variable of the mark. Children inherit it.
MARK = "MEDSPARK_ATTEMPT"


def mark_of(folder: Path, nonce: str) -> str:
    """Return the mark of the attempt in ``folder``, which is unique to it."""
    return f"{nonce} {folder}"


def belongs(process: psutil.Process, mark: str) -> bool:
    """Return whether ``process`` is this user's and carries ``mark``; False if that is unknown.

    The kernel returns the environment of the process, even if the process is stopped.
    """
    with suppress(psutil.Error):
        return bool(process.uids().real == os.getuid() and process.environ().get(MARK, "") == mark)
    return False


def end(pid: int, mark: str) -> None:
    """Kill the process ``pid``, even a stopped one, if it carries ``mark``."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if belongs(process, mark):
            process.kill()  # psutil checks that the id has not been reused
