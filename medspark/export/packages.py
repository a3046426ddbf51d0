"""The backends of exported models, and the packages that each needs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from medspark.errors import UsageError
from medspark.models.card import Kind

__all__ = ["KINDS", "Backend", "Precision", "check_backends"]

Backend = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "int8"]

KINDS: dict[Backend, Kind] = {"onnxruntime": "onnx", "openvino": "openvino"}
# Every export goes through ONNX, which onnxruntime checks.
_ALWAYS = ("onnx", "onnxruntime")


def check_backends(backends: Sequence[Backend], precisions: Sequence[Precision]) -> None:
    """Raise UsageError for a package that is missing, before anything imports it."""
    needed = [*_ALWAYS]
    if "openvino" in backends:
        needed += ["openvino", "nncf"] if "int8" in precisions else ["openvino"]
    for name in needed:
        if find_spec(name) is None:
            extras = "edge" if name in _ALWAYS else "edge,openvino"
            raise UsageError(f"Exports need the package {name}: pip install 'medspark[{extras}]'.")
