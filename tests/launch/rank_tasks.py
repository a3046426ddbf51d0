"""Small tasks for ranks; the tests put this folder on the ranks' PYTHONPATH."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from medspark.config import Config
from medspark.errors import UsageError
from medspark.train.world import World


class TinyConfig(Config):
    """Number of steps, the fault at one of them, and the file that records the fault."""

    steps: int = 3
    trouble: str = ""
    trouble_step: int = 1
    trouble_rank: int = 1
    step_seconds: float = 0.0
    checkpoints: Path | None = None
    attempt: int = 0
    resume: str = "never"


class Recorder(Protocol):
    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...


def add_up(config: TinyConfig, world: World, journal: Recorder) -> dict[str, Any]:
    """Add up the ranks' numbers once per step, starting at the last checkpoint."""
    total, first = _resume(config)
    for step in range(first, config.steps):
        if config.trouble and step == config.trouble_step and world.rank == config.trouble_rank:
            _TROUBLES[config.trouble](config)
        time.sleep(config.step_seconds)
        total += float(world.sum(torch.tensor(float(world.rank + 1))))
        journal.record(step, {"total": total})
        if config.checkpoints is not None and world.is_main:
            (config.checkpoints / f"step-{step:03d}").write_text(str(total))
    return {
        "total": total,
        "threads": world.gather(torch.get_num_threads()),
        "first": first,
        "attempt": config.attempt,
        "world": world.size,
        "backend": dist.get_backend() if world.distributed else "none",
        "page_faults": _page_faults(),
    }


def _page_faults() -> int:
    """Return the page faults of a block of 64 MiB after one of equal size was freed."""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resume(config: TinyConfig) -> tuple[float, int]:
    saved = sorted(config.checkpoints.glob("step-*")) if config.checkpoints else []
    if config.resume != "auto" or not saved:
        return 0.0, 0
    return float(saved[-1].read_text()), int(saved[-1].name.removeprefix("step-")) + 1


def _raise(config: TinyConfig) -> None:
    raise ValueError("the scanner is on fire")


def _misuse(config: TinyConfig) -> None:
    raise UsageError("The shard x.parquet is missing.")


def _kill_itself(config: TinyConfig) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_itself_once(config: TinyConfig) -> None:
    if config.resume != "auto":
        _kill_itself(config)


def _kill_its_agent(config: TinyConfig) -> None:
    sentinel = os.getppid()
    stat = Path(f"/proc/{sentinel}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    time.sleep(600)


def _kill_its_sentinel(config: TinyConfig) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def _stop_itself(config: TinyConfig) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _print_rubbish(config: TinyConfig) -> None:
    os.write(1, b"\xff\xfe not UTF-8 \xc3\n")


_TROUBLES = {
    "raise": _raise,
    "misuse": _misuse,
    "sigkill": _kill_itself,
    "sigkill_once": _kill_itself_once,
    "kill_agent": _kill_its_agent,
    "kill_sentinel": _kill_its_sentinel,
    "sigstop": _stop_itself,
    "rubbish": _print_rubbish,
}
