"""Keep fitted detectors as arrays (safetensors) and a description (JSON), without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medspark.config import Config
from medspark.defend.detect.combination import Combination
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.logistic import Logistic
from medspark.defend.detect.registry import DETECTORS
from medspark.errors import UsageError
from medspark.files import replacing, sha256_of

__all__ = ["StoredDetector", "load_detectors", "save_detectors"]

_KNOWN: Mapping[str, type[Detector]] = {**DETECTORS, Combination.name: Combination}


class StoredDetector(Config):
    """A detector without its arrays: numbers, names, and the detectors that it combines."""

    name: str = Field(max_length=100)
    numbers: dict[str, int | float | str | tuple[str, ...]] = Field({}, max_length=100)
    detectors: tuple[StoredDetector, ...] = Field((), max_length=1000)


def save_detectors(
    path: Path, detectors: Sequence[Detector], more: Mapping[str, Tensor] | None = None
) -> tuple[StoredDetector, ...]:
    """Write the arrays of ``detectors``, and ``more``, to ``path``; return the descriptions."""
    arrays: dict[str, Tensor] = dict(more or {})
    described = tuple(_pack(each, f"{number}.", arrays) for number, each in enumerate(detectors))
    with replacing(path, durable=True) as draft:
        # Copies, because detectors may share tensors, which safetensors does not allow.
        save_file({name: tensor.clone().contiguous() for name, tensor in arrays.items()}, draft)
    return described


def load_detectors(
    path: Path, described: Sequence[StoredDetector], *, sha256: str | None = None
) -> tuple[list[Detector], dict[str, Tensor]]:
    """Return the detectors in ``path``, and its other arrays.

    Raises UsageError if the file is not the one that was described, or is not a file of detectors.
    """
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise UsageError(f"'{path}' has been changed since its guard was written.")
        arrays = load_file(path)
        found = [_unpack(each, f"{number}.", arrays) for number, each in enumerate(described)]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UsageError(f"'{path}' does not hold the detectors that it should: {error}.") from None
    if not all(torch.isfinite(tensor).all() for tensor in arrays.values()):
        raise UsageError(f"'{path}' holds numbers that are not finite.")
    more = {name: tensor for name, tensor in arrays.items() if not name[0].isdigit()}
    return found, more


def _pack(detector: Detector, prefix: str, arrays: dict[str, Tensor]) -> StoredDetector:
    numbers: dict[str, int | float | str | tuple[str, ...]] = {}
    parts: tuple[StoredDetector, ...] = ()
    for name, kind in _fields(type(detector)):
        value = getattr(detector, name)
        if isinstance(value, Tensor):
            arrays[prefix + name] = value
        elif isinstance(value, Logistic):
            for inner in fields(value):
                arrays[f"{prefix}{name}.{inner.name}"] = getattr(value, inner.name)
        elif isinstance(value, tuple) and kind != tuple[str, ...]:
            parts = tuple(
                _pack(each, f"{prefix}{number}.", arrays) for number, each in enumerate(value)
            )
        else:
            numbers[name] = value
    return StoredDetector(name=detector.name, numbers=numbers, detectors=parts)


def _unpack(stored: StoredDetector, prefix: str, arrays: Mapping[str, Tensor]) -> Detector:
    cls = _KNOWN[stored.name]
    values: dict[str, Any] = {}
    for name, kind in _fields(cls):
        if kind is Tensor:
            values[name] = arrays[prefix + name]
        elif kind is Logistic:
            parts = {inner.name: arrays[f"{prefix}{name}.{inner.name}"] for inner in fields(kind)}
            values[name] = Logistic(**parts)
        elif kind in (int, float, str):
            values[name] = kind(stored.numbers[name])
        elif kind == tuple[str, ...]:
            values[name] = tuple(cast("tuple[str, ...]", stored.numbers[name]))
        else:
            values[name] = tuple(
                _unpack(each, f"{prefix}{number}.", arrays)
                for number, each in enumerate(stored.detectors)
            )
    return cls(**values)


def _fields(cls: type[Detector]) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    return ((field.name, hints[field.name]) for field in fields(cls))
