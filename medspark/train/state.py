"""Checkpoints that a crash at any moment leaves whole, and that a superseded run cannot replace.

Each is a fresh folder with the tensors in safetensors and the rest in JSON; nothing is pickled.
It is written under another name and renamed, and its JSON holds the SHA-256 of the tensors, so
that a folder half written (some mounts rename piece by piece) is recognised and passed over.
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
from medspark.files import sha256_of

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
    """One checkpoint: all tensors by name, and the JSON record beside them."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, as attempt number ``attempt`` of it sees them."""

    def __init__(self, folder: Path, *, attempt: int, keep: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._keep = keep
        self._damaged: set[Path] = set()

    def claim(self) -> None:
        """Fence off earlier attempts: what they try to save from now on is refused.

        Raises RunError if a later attempt has claimed the run already.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_fence()
        scratch = self._folder / f".{FENCE}-{self._attempt}"
        scratch.write_text(str(self._attempt), encoding="utf-8")
        os.replace(scratch, self._folder / FENCE)

    def clear(self) -> None:
        """Remove every checkpoint of the run."""
        for path in self._all():
            _remove(path)

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bool:
        """Write a checkpoint after ``step`` steps; return whether it is there.

        A full disk is logged and survived: losing a checkpoint is better than losing the run.
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
        except (OSError, SafetensorError) as error:  # its own for a full disk
            _LOGGER.warning("no checkpoint at step %d: %s", step, error)
            _remove(scratch)
            return False
        self._forget_before(target)
        return True

    def latest(self) -> Saved | None:
        """Return the newest checkpoint that is whole; damaged ones are passed over and logged."""
        for path in reversed(self._all()):
            saved = _load(path)
            if saved is not None:
                return saved
            self._damaged.add(path)
            _LOGGER.warning("the checkpoint %s is damaged and is passed over", path)
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
        """Keep ``newest``, and the last before it that were not found damaged, so many in all.

        A higher step is of an earlier attempt, which could not be gone on from; no reason to lose
        what has just been written.
        """
        whole = [path for path in self._all() if path <= newest and path not in self._damaged]
        for path in whole[: -self._keep]:
            _remove(path)

    def _all(self) -> list[Path]:
        found = self._folder.iterdir() if self._folder.exists() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint as far as it is one: what others have put there stays."""
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
    """Put back what ``optimiser_tensors`` took; learning rates are set anew at every step."""
    for name, parameter in model.named_parameters():
        prefix = f"optimiser/{name}/"
        state = {key[len(prefix) :]: v for key, v in tensors.items() if key.startswith(prefix)}
        if state:
            optimiser.state[parameter] = {
                # The fused update wants counts beside the parameter, and moments that lie like it.
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
