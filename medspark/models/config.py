"""The configuration of the network: its name and its initial weights."""

from __future__ import annotations

import difflib
import re
import struct
from pathlib import Path
from typing import Any

from pydantic import Field

from medspark.config import Config
from medspark.documents import open_regular, parse_json
from medspark.errors import UsageError
from medspark.models.card import read_card
from medspark.models.local import local_model
from medspark.remote import any_path

__all__ = [
    "PRETRAINED",
    "USUAL",
    "ModelConfig",
    "check_model",
    "check_weights",
    "model_folder",
    "tensor_names",
    "tensor_shapes",
    "timm_model",
    "timm_name",
    "with_patches",
]

PRETRAINED = "pretrained"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
ALIASES = {"mobilenet_v2": "mobilenetv2_100", "mobilenetv2": "mobilenetv2_100"}
# Models that timm certainly has, with weights: importing timm to check takes seconds.
USUAL = {"densenet121", "mobilenetv2_100", "resnet50"}
_PATCH = re.compile(r"(?:vit|deit3?)_\w*?patch([1-9]\d{0,2})_")
_PATCHES_OF_TIMM = (16, 14, 32, 8)  # pixels of a side


class ModelConfig(Config):
    """The network and its initial weights."""

    name: str = Field(
        "mobilenetv2_100",
        description="timm model name, usually densenet121, mobilenet_v2 or resnet50; of a vision "
        "transformer with patches of any size, as vit_tiny_patch8_224",
    )
    weights: str | None = Field(
        None,
        description="initial weights: 'pretrained' (timm's, from the hub), the path of a "
        ".safetensors file with timm's names, a model folder that train_at wrote, or none for "
        "random weights",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="drop rate before the classifier head")


def check_model(config: ModelConfig) -> None:
    """Raise UsageError if ``config`` names an unknown model or an unusable weights file."""
    check_weights(config)
    name = timm_name(config.name)
    if name in USUAL:
        return
    from medspark.models.torchvision_ops import import_timm  # imports torch

    timm = import_timm()
    name, _ = timm_model(name)
    if not timm.is_model(name):
        known = [*timm.list_models(), *ALIASES]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise UsageError(f"model.name: timm has no model '{config.name}'; {hint}")
    if config.weights == PRETRAINED and not timm.is_model_pretrained(name):
        raise UsageError(f"model.weights: timm has no pretrained weights for '{name}'.")


def check_weights(config: ModelConfig) -> None:
    """Raise UsageError if the weights cannot be used; does not import timm.

    They are missing, not safetensors, or a folder with a model of another name.
    """
    if (folder := model_folder(config)) is not None:
        found = read_card(folder).architecture
        if found != timm_name(config.name):
            raise UsageError(
                f"model.weights: '{folder}' holds a {found}, but model.name is {config.name}."
            )
    elif config.weights not in (None, PRETRAINED):
        tensor_names(local_model(any_path(str(config.weights))))


def model_folder(config: ModelConfig) -> Path | None:
    """Return the model folder that the first weights are from, None if they are from elsewhere."""
    if config.weights in (None, PRETRAINED):
        return None
    folder = any_path(str(config.weights))
    return folder if folder.is_dir() else None


def timm_name(name: str) -> str:
    """Return timm's name of the model ``name``."""
    return ALIASES.get(name, name)


def timm_model(name: str) -> tuple[str, dict[str, int]]:
    """Return the model of timm that ``name`` asks for, and the options that it needs for it.

    timm has vision transformers with patches of a few sizes, and takes others as an option.
    Pretrained weights are resampled to the patches (Beyer et al. 2023, FlexiViT). A ``name`` that
    timm cannot make is returned as it is.
    """
    from medspark.models.torchvision_ops import import_timm  # imports torch

    timm, name = import_timm(), timm_name(name)
    patch = _PATCH.match(name)
    if patch is None or timm.is_model(name):
        return name, {}
    for side in _PATCHES_OF_TIMM:
        other = with_patches(name, side)
        if other is not None and timm.is_model(other):
            return other, {"patch_size": int(patch[1])}
    return name, {}


def with_patches(name: str, side: int) -> str | None:
    """Return the name of a vision transformer with patches of ``side`` pixels, None for others."""
    patch = _PATCH.match(name)
    return patch and f"{name[: patch.start(1)]}{side}{name[patch.end(1) :]}"


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; reads its header only.

    Raises UsageError if the file is missing or not a .safetensors file. Other formats are not
    opened, because torch's own unpickles, and unpickling can run code.
    """
    return set(tensor_shapes(path))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file by name, as ``tensor_names`` does."""
    header = _header(path)
    return {
        name: tuple(entry.get("shape", ()) if isinstance(entry, dict) else ())
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        raise UsageError(
            f"model.weights: '{path}' is not a .safetensors file; other formats are not loaded "
            "because opening them can run code."
        )
    try:
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(path.stat().st_size, _LARGEST_HEADER):
                raise ValueError("the header is longer than the file or than the format allows")
            header = parse_json(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("the header names no tensors")
    except OSError as error:
        raise UsageError(f"model.weights: cannot read '{path}': {error.strerror}.") from error
    except (ValueError, struct.error) as error:
        raise UsageError(f"model.weights: '{path}' is not a safetensors file: {error}.") from error
    return header
