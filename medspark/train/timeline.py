"""When a training passed which point, and how much memory it took: what its cost is made of."""

from __future__ import annotations

import resource
import sys
import time

__all__ = ["Timeline", "peak_memory_mb"]


class Timeline:
    """Moments (seconds since 1970) by name, each noted the first time that it comes."""

    def __init__(self) -> None:
        self.moments: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Keep this moment as ``name``, unless it has been there before."""
        self.moments.setdefault(name, time.time())


def peak_memory_mb() -> float:
    """Return the most memory (MB) that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes elsewhere
