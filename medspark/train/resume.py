"""The progress of a run: when to save it, and how to resume an interrupted run."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from medspark.errors import UsageError
from medspark.train.config import CheckpointConfig
from medspark.train.engine import Engine
from medspark.train.monitor import Monitor
from medspark.train.result import ValidationResult
from medspark.train.run_setup import RunSetup
from medspark.train.state import Checkpoints

__all__ = ["Progress", "Resumption"]

_LOGGER = logging.getLogger(__name__)


@dataclass
class Progress:
    """The progress of a run: steps taken, the best epoch, all validations and all alarms."""

    step: int = 0
    best: ValidationResult | None = None
    validations: list[ValidationResult] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether an alarm has stopped the training."""
        return any(alarm["action"] == "restore" for alarm in self.alarms)


class Resumption:
    """Saves and restores an engine, its progress and its monitor."""

    def __init__(
        self, setup: RunSetup, engine: Engine, progress: Progress, monitor: Monitor
    ) -> None:
        self._setup = setup
        self._engine = engine
        self._progress = progress
        self._monitor = monitor
        self._checkpoints = Checkpoints(
            setup.config.run_dir / "checkpoints",
            attempt=setup.config.attempt,
            keep=self._when.keep,
        )
        self._saved_at = time.monotonic()

    @property
    def _when(self) -> CheckpointConfig:
        return self._setup.config.checkpoint

    @property
    def asked(self) -> bool:
        """Whether ``checkpoint.every_steps`` asks for a checkpoint after the current step."""
        every = self._when.every_steps
        return every > 0 and self._progress.step % every == 0

    @property
    def due(self) -> bool:
        """Whether to save now, by ``checkpoint.every_steps`` or ``checkpoint.every_minutes``."""
        late = 0 < 60 * self._when.every_minutes <= time.monotonic() - self._saved_at
        return self.asked or late

    def save(self, *, seconds: float) -> None:
        """Write a checkpoint, on the main rank; ``seconds`` is the training time so far."""
        self._saved_at = time.monotonic()
        if not self._setup.world.is_main:
            return
        best = self._progress.best
        record = {
            "fingerprint": self._fingerprint(),
            "best": best.as_json() if best is not None else None,
            "validations": [validation.as_json() for validation in self._progress.validations],
            "alarms": self._progress.alarms,
            "noise": self._engine.noise,
            "watched_best": self._monitor.best,
            "seconds": seconds,
        }
        self._checkpoints.save(self._progress.step, self._engine.tensors(), record)

    def resume(self) -> None:
        """Resume from the newest checkpoint, if there is one.

        Raises UsageError if the ranks find different checkpoints, or if the checkpoint has other
        data or another configuration.
        """
        config, world = self._setup.config, self._setup.world
        if world.is_main:
            self._checkpoints.claim()
            if config.resume == "never":
                self._checkpoints.clear()
        world.barrier()
        saved = self._checkpoints.latest()
        steps = world.gather(saved.record["step"] if saved else 0)
        if len(set(steps)) > 1:
            raise UsageError(
                f"The ranks find different checkpoints in {config.run_dir} (steps {steps}): "
                "run_dir must be a folder that all ranks share."
            )
        if saved is None:
            return
        self._check(saved.record["fingerprint"])
        self._engine.restore(saved.tensors)
        progress, record = self._progress, saved.record
        read = ValidationResult.model_validate
        progress.step, progress.alarms = record["step"], record["alarms"]
        progress.best = read(record["best"]) if record["best"] is not None else None
        progress.validations = [read(validation) for validation in record["validations"]]
        self._engine.noise, self._monitor.best = record["noise"], record["watched_best"]
        _LOGGER.info("resuming from the checkpoint after step %d", progress.step)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "dataset": self._setup.source.manifest.digest,
            "config": self._setup.config.digest(),
            "precision": self._engine.precision,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "world": self._setup.world.size,
        }

    def _check(self, saved: dict[str, Any]) -> None:
        current = self._fingerprint()
        differing = [key for key in current if current[key] != saved.get(key)]
        if "dataset" in differing or "config" in differing:
            raise UsageError(
                f"{self._setup.config.run_dir} holds a run with other data or another "
                "configuration: use another run_dir, or --overwrite to start again there."
            )
        if differing:
            _LOGGER.warning(
                "resuming with another %s: the images of each step stay the same, but the weights "
                "may differ in the last bits from those of an unbroken run",
                ", ".join(differing),
            )
