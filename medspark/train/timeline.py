"""Record when a training passes each phase, and its peak memory."""

from __future__ import annotations

import resource
import sys
import time

__all__ = ["Timeline", "peak_memory_mb"]


class Timeline:
    """Times (seconds since 1970) by name; only the first call for a name counts."""

    def __init__(self) -> None:
        self.moments: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Record the current time as ``name``, unless ``name`` is already recorded."""
        self.moments.setdefault(name, time.time())


def peak_memory_mb() -> float:
    """Return the peak resident memory (MB) of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # macOS: bytes, else kilobytes
