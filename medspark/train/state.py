"""Checkpoints that survive a crash at any moment and that a superseded attempt cannot replace.

Each checkpoint is a new folder with the tensors in safetensors and the rest in JSON; nothing is
pickled. It is written under another name and renamed. Its JSON holds the SHA-256 of the tensors, so
a partly written folder (some mounts rename file by file) is recognised and skipped.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medspark import ownership
from medspark.errors import RunError
from medspark.files import sha256_of, write_whole

__all__ = [
    "Checkpoints",
    "Saved",
    "optimiser_tensors",
    "restore_optimiser",
]

_LOGGER = logging.getLogger(__name__)

TENSORS, RECORD, FENCE = "state.safetensors", "state.json", "attempt"
_NAME = re.compile(r"step-\d{9}-attempt-\d{4,}")


@dataclass(frozen=True)
class Saved:
    """One checkpoint: all tensors by name, and the JSON record."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, used by its attempt number ``attempt``."""

    def __init__(self, folder: Path, *, attempt: int, keep: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._keep = keep
        self._damaged: set[Path] = set()

    def claim(self) -> None:
        """Fence off earlier attempts: from now on their saves raise RunError.

        Raises RunError if a later attempt has already claimed the run.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_fence()
        write_whole(self._folder / FENCE, str(self._attempt))

    def clear(self) -> None:
        """Remove every checkpoint of the run."""
        for path in self._all():
            _remove(path)

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bool:
        """Write a checkpoint after ``step`` steps; return whether that succeeded.

        A full disk is logged and does not raise: losing a checkpoint is better than losing the run.
        Raises RunError if a later attempt has taken the run over.
        """
        self._check_fence()
        target = self._folder / f"step-{step:09d}-attempt-{self._attempt:04d}"
        scratch = self._folder / f".{target.name}"
        try:
            self._write(scratch, tensors, dict(record) | {"step": step, "attempt": self._attempt})
            _remove(target)
            self._check_fence()
            os.replace(scratch, target)
        except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
            _LOGGER.warning("no checkpoint at step %d: %s", step, error)
            _remove(scratch)
            return False
        self._forget_before(target)
        return True

    def latest(self) -> Saved | None:
        """Return the newest intact checkpoint; damaged ones are logged and skipped."""
        for path in reversed(self._all()):
            saved = _load(path)
            if saved is not None:
                return saved
            self._damaged.add(path)
            _LOGGER.warning("the checkpoint %s is damaged and is skipped", path)
        return None

    def _write(self, folder: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        _remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, folder / TENSORS)
        _flush(folder / TENSORS)
        record["sha256"] = sha256_of(folder / TENSORS)
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _flush(folder / RECORD)

    def _check_fence(self) -> None:
        try:
            holder = int((self._folder / FENCE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if holder > self._attempt:
            raise RunError(
                f"Attempt {holder} has taken this run over; attempt {self._attempt} stops."
            )

    def _forget_before(self, newest: Path) -> None:
        """Keep ``newest`` and the intact checkpoints before it, ``keep`` in total.

        Checkpoints with a higher step do not count: they are damaged ones of an earlier attempt.
        """
        intact = [path for path in self._all() if path <= newest and path not in self._damaged]
        for path in intact[: -self._keep]:
            _remove(path)

    def _all(self) -> list[Path]:
        paths = self._folder.iterdir() if self._folder.exists() else ()
        return sorted(path for path in paths if _NAME.fullmatch(path.name))


def _remove(checkpoint: Path) -> None:
    """Remove the files of a checkpoint, and its folder if no other files are in it."""
    with suppress(OSError):
        ownership.remove(checkpoint, map(re.escape, (TENSORS, RECORD)))
        checkpoint.rmdir()


def optimiser_tensors(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name, as ``optimiser/NAME/KEY``."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"optimiser/{names[parameter]}/{key}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore the result of ``optimiser_tensors``; each step sets the learning rates itself."""
    for name, parameter in model.named_parameters():
        prefix = f"optimiser/{name}/"
        state = {key[len(prefix) :]: v for key, v in tensors.items() if key.startswith(prefix)}
        if state:
            optimiser.state[parameter] = {
                # The fused update needs counts on the parameter's device and moments in its layout.
                key: value.to(parameter.device, copy=True)
                if value.ndim == 0
                else _like(value, parameter)
                for key, value in state.items()
            }


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter).copy_(value)


def _load(folder: Path) -> Saved | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if sha256_of(folder / TENSORS) != record["sha256"]:
            return None
        return Saved(load_file(folder / TENSORS), record)
    except (OSError, ValueError, KeyError):
        return None


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
