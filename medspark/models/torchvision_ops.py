"""Make timm importable on machines where torchvision's compiled operators do not load.

With a CPU build of torch and PyPI's CUDA wheel of torchvision, importing torchvision fails: it
registers fake kernels for two operators that only its compiled library declares. Declaring their
schemas suffices, because no classifier calls them.
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
# A library object withdraws its declarations when it is collected, so keep it here.
_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """Import and return timm, even if torchvision's compiled operators do not load."""
    declare_missing_operators()
    import timm

    return timm


def declare_missing_operators() -> bool:
    """Declare the operators that torchvision needs at import; return whether any was missing."""
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
