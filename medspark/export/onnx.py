"""Export a classifier to ONNX: normalisation inside, any batch size, one file."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any, cast

import torch

from medspark.errors import UsageError
from medspark.models.classifier import Classifier
from medspark.models.onnx_session import OnnxSession

__all__ = ["OPSET", "TOLERANCE", "export_onnx"]

OPSET = 17  # the newest that onnxruntime 1.13 and OpenVINO 2022.3 read
# Largest difference in probability between a float graph and its torch twin.
TOLERANCE = 1e-4
_BATCHES = (1, 3)  # a graph with a fixed batch size fails on one of them


def export_onnx(model: Classifier, *, height: int, width: int) -> bytes:
    """Return ``model`` as an ONNX file: ``images`` (N, C, H, W) in [0, 1] to ``logits`` (N, K).

    Raises UsageError if ONNX lacks an operator, which the message names, or if the ONNX graph's
    probabilities differ from the network's.
    """
    images = torch.rand(
        1, model.channels, height, width, generator=torch.Generator().manual_seed(0)
    )
    content, file = b"", io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated; the other one needs onnxscript and takes minutes.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model.eval(),
                (images,),
                cast(Any, file),  # a file in memory works, but is not declared
                dynamo=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise UsageError(
                f"{model.architecture} cannot be exported: {_operator(error)}."
            ) from error
    content = file.getvalue()
    _check(content, model, images)
    return content


def _operator(error: Exception) -> str:
    """Return the operator that ONNX lacks, or else the exporter's message."""
    found = re.search(r"\b(?:aten|prim|torchvision|quantized)::\w+", str(error))
    if found is None:
        return " ".join(str(error).split())[:200].rstrip(".")
    return f"ONNX operators of version {OPSET} have no counterpart of {found[0]}"


def _check(content: bytes, model: Classifier, image: torch.Tensor) -> None:
    """Raise UsageError if the graph differs from ``model``, alone or in a batch."""
    run = OnnxSession(content, name=f"{model.architecture} in ONNX")
    for count in _BATCHES:
        images = torch.cat([image.roll(shift, dims=3) for shift in range(count)])
        with torch.no_grad():
            wanted = model(images).softmax(1)
        found = torch.from_numpy(run(images.numpy())).softmax(1)
        difference = float((found - wanted).abs().max())
        if not difference <= TOLERANCE:
            raise UsageError(
                f"{model.architecture} cannot be exported: in ONNX its probabilities differ by "
                f"{difference:.2g} for {count} image(s)."
            )
