"""A classifier from an ONNX file: it returns logits, but no gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.models.onnx_session import OnnxSession
from medspark.shards.manifest import Manifest


class OnnxClassifier(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], computed by onnxruntime on the CPU."""

    gradients = False

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Open the file. Raises UsageError if it is not an ONNX model or onnxruntime is missing."""
        super().__init__()
        self._run = OnnxSession(path, name=str(path), threads=threads)

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
        return torch.from_numpy(self._run(pixels)).to(images.device)
