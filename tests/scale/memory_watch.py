"""Run a command, and measure its time and the memory of its driver, workers and ranks."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

# Roles of the processes below a job.
DRIVER, DRIVER_JVM, EXECUTOR_JVM, WORKER = "driver", "driver_jvm", "executor_jvm", "worker"
_EVERY_SECONDS = 0.2
_JOB = re.compile(r"(^|/)jobs/\w+\.py$")
_FULL = re.compile(r"Pause Full .*->(\d+)M\(")


def run(
    command: Sequence[object], *, log: Path, environment: Mapping[str, str], cwd: Path
) -> dict[str, Any]:
    """Run ``command``; return its seconds and, by role, the most megabytes of one process.

    What it prints goes to ``log``. Raises RuntimeError if it fails.
    """
    with log.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT,
            env=dict(environment), cwd=cwd,
        )  # fmt: skip
        with _Watch(process.pid) as watch:
            status = process.wait()
        seconds = time.monotonic() - began
    if status:
        raise RuntimeError(f"status {status}, see {log}: {' '.join(map(str, command))}")
    return {"seconds": seconds, "peak_mb": {k: v / 1e6 for k, v in sorted(watch.peaks.items())}}


@contextlib.contextmanager
def watching(process: int) -> Iterator[Callable[[], dict[str, float]]]:
    """Watch the processes below ``process``; yield a function that returns the peaks in MB."""
    with _Watch(process) as watch:
        yield lambda: {role: peak / 1e6 for role, peak in sorted(watch.peaks.items())}


def live_heap(log: Path) -> int | None:
    """Return the most megabytes that a JVM held after a full collection, from its log, if any."""
    held = [int(match[1]) for match in _FULL.finditer(log.read_text())] if log.exists() else []
    return max(held, default=None)


class _Watch(threading.Thread):
    """Notes the largest process of each role below a process."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = defaultdict(float)
        self._root, self._end = root, threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._end.wait(_EVERY_SECONDS):
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(self._root)
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        self._note(process)

    def _note(self, process: psutil.Process) -> None:
        role = _role(process.cmdline())
        if role is not None:
            info = process.memory_info()
            # Pages of files that a process maps are the kernel's to take back.
            self.peaks[role] = max(self.peaks[role], info.rss - info.shared)

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def _role(words: Sequence[str]) -> str | None:
    line = " ".join(words)
    if not words:
        return None
    if Path(words[0]).name == "java":
        return EXECUTOR_JVM if "CoarseGrainedExecutorBackend" in line else DRIVER_JVM
    if "python" not in Path(words[0]).name:
        return None
    # Whatever is no job is a worker of Spark, what it has forked, or a rank.
    return DRIVER if any(map(_JOB.search, words)) else WORKER
