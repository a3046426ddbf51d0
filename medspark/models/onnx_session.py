"""Run an ONNX graph with onnxruntime on the CPU, on NumPy arrays; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.errors import UsageError

__all__ = ["OnnxSession"]

# It rounds the weights of float layers between 8-bit ones, with one scale for all channels.
_DISABLED = ["WeightBiasQuantization"]


class OnnxSession:
    """Outputs of an ONNX graph whose first input is a batch of images."""

    def __init__(self, source: Path | bytes, *, name: str, threads: int = 1) -> None:
        """Open the file, or the content of one. ``name`` is what error messages call it.

        Raises UsageError if it is not an ONNX model or onnxruntime is missing.
        """
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as errors
        except ImportError as error:
            raise UsageError("ONNX models need onnxruntime: pip install medspark[edge].") from error
        # onnxruntime's errors share no base class.
        self._errors = tuple(
            kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self._name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # onnxruntime also raises what it logs
        content = source if isinstance(source, bytes) else str(source)
        providers = ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=providers, disabled_optimizers=_DISABLED
            )
        except self._errors as error:
            raise UsageError(f"'{name}' cannot be opened as an ONNX model.") from error
        if not self._session.get_inputs() or not self._session.get_outputs():
            raise UsageError(f"'{name}' is an ONNX model without an input or an output.")
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the first output. Raises UsageError for images that the graph does not take."""
        try:
            (output, *_) = self._session.run(None, {self._input: images})
        except self._errors as error:
            raise UsageError(f"'{self._name}' does not take images {images.shape}.") from error
        return np.asarray(output)
