"""A process proves that it belongs to an attempt: it carries the attempt's mark itself.

A process number in a file proves nothing: the file may lie, and the number may be another's by now.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["MARK", "belongs", "end", "mark_of"]

# In the environment that a process was started with, which its children inherit.
MARK = "MEDSPARK_ATTEMPT"


def mark_of(folder: Path, nonce: str) -> str:
    """Return what the processes of the attempt in ``folder`` carry: no other attempt's do."""
    return f"{nonce} {folder}"


def belongs(process: psutil.Process, mark: str) -> bool:
    """Return whether ``process`` is this user's and carries ``mark``; False where nobody can say.

    What is asked is the environment that the kernel keeps, which a stopped process has, too.
    """
    with suppress(psutil.Error):
        return bool(process.uids().real == os.getuid() and process.environ().get(MARK, "") == mark)
    return False


def end(pid: int, mark: str) -> None:
    """Kill the process of number ``pid``, even a stopped one, if it carries ``mark``."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if belongs(process, mark):
            process.kill()  # psutil makes sure that the number is still the same process's
