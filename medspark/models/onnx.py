"""A classifier that somebody exported to ONNX: it answers, and gives no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from medspark.errors import UsageError


class OnnxClassifier(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], by onnxruntime on the CPU."""

    gradients = False

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Open the file. Raises UsageError if it is no ONNX model or onnxruntime is missing."""
        super().__init__()
        try:
            import onnxruntime  # type: ignore[import-not-found,unused-ignore]
            from onnxruntime.capi import (  # type: ignore[import-not-found,unused-ignore]
                onnxruntime_pybind11_state as errors,
            )
        except ImportError as error:
            raise UsageError("ONNX models need onnxruntime: pip install medspark[onnx].") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile) as e:
            raise UsageError(f"'{path}' cannot be opened as an ONNX model.") from e
        self._input = self._session.get_inputs()[0].name

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """Return the classifier itself: its session cannot be copied, and does not change."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.detach().cpu().contiguous().numpy()
        (logits, *_) = self._session.run(None, {self._input: pixels})
        return torch.from_numpy(logits).to(images.device)
