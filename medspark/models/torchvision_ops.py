"""Make timm importable where torchvision's compiled operators do not load.

A machine that mixes a CPU build of torch with PyPI's CUDA wheel of torchvision cannot import
torchvision: it registers fake kernels for two operators that only its compiled library
declares. Declaring their schemas is enough, because no classifier calls them.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_LOGGER = logging.getLogger(__name__)

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library object takes its declarations back when it is collected, so it lives here.
_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """Import timm, also where torchvision's compiled operators do not load."""
    declare_missing_operators()
    import timm

    return timm


def declare_missing_operators() -> bool:
    """Declare what torchvision needs at import; return whether anything was missing."""
    package = importlib.util.find_spec("torchvision")
    if _declared or package is None or package.origin is None:
        return bool(_declared)
    if _compiled_operators_load(Path(package.origin).parent):
        return False
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    _LOGGER.debug("torchvision's compiled operators do not load here: schemas declared")
    return True


def _compiled_operators_load(folder: Path) -> bool:
    for path in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError:
            return False
        return True
    return False
