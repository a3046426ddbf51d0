"""A classifier from an ONNX file: it returns logits, but no gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.shards.manifest import Manifest


class OnnxClassifier(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], computed by onnxruntime on the CPU."""

    gradients = False

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Open the file. Raises UsageError if it is not an ONNX model or onnxruntime is missing."""
        super().__init__()
        try:
            import onnxruntime  # type: ignore[import-not-found,unused-ignore]
            from onnxruntime.capi import (  # type: ignore[import-not-found,unused-ignore]
                onnxruntime_pybind11_state as errors,
            )
        except ImportError as error:
            raise UsageError("ONNX models need onnxruntime: pip install medspark[edge].") from error
        # onnxruntime's errors share no base class.
        self._errors = tuple(
            kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self._path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # onnxruntime also raises what it logs
        providers = ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except self._errors as error:
            raise UsageError(f"'{path}' cannot be opened as an ONNX model.") from error
        if not self._session.get_inputs() or not self._session.get_outputs():
            raise UsageError(f"'{path}' is an ONNX model without an input or an output.")
        self._input = self._session.get_inputs()[0].name

    def misfit(self, manifest: Manifest) -> str:
        """Return why the model does not fit the images and classes of the shards; "" if it fits."""
        image = torch.zeros(1, manifest.channels, manifest.height, manifest.width)
        try:
            logits = self(image)
        except UsageError as error:
            return str(error)
        wanted = (1, len(manifest.classes))
        if logits.shape != wanted or not logits.is_floating_point():
            return f"its output is {tuple(logits.shape)} {logits.dtype}, but should be {wanted}"
        return ""

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """Return the classifier itself: its session cannot be copied and never changes."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K). Raises UsageError for images that the model does not take."""
        pixels = images.detach().cpu().contiguous().numpy()
        try:
            (logits, *_) = self._session.run(None, {self._input: pixels})
        except self._errors as error:
            shape = tuple(images.shape)
            raise UsageError(f"'{self._path}' does not take images {shape}.") from error
        return torch.from_numpy(np.asarray(logits)).to(images.device)
