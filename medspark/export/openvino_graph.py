"""Quantise with NNCF, and turn an ONNX graph into OpenVINO's format: the second backend."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from medspark.errors import UsageError
from medspark.export.runtime import BIN, XML
from medspark.models.card import GraphFile

__all__ = ["as_openvino", "quantised_by_nncf"]


def as_openvino(content: bytes) -> dict[GraphFile, bytes]:
    """Return an ONNX graph as the two files of OpenVINO's format.

    Raises UsageError if openvino is missing or does not support an operator.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError(
            "OpenVINO models need openvino: pip install medspark[openvino]."
        ) from error
    try:
        model = openvino.Core().read_model(model=content)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UsageError(f"OpenVINO cannot read the graph: {reason.rstrip('.')}.") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, XML)
        openvino.save_model(model, str(path), compress_to_fp16=False)
        return {XML: path.read_bytes(), BIN: path.with_suffix(".bin").read_bytes()}


def quantised_by_nncf(
    content: bytes,
    images: npt.NDArray[np.float32],
    *,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
) -> bytes:
    """Return a float ONNX graph in 8 bits, in the form QDQ, calibrated on ``images``.

    NNCF quantises per channel and corrects the biases (Nagel et al. 2019). ``reduce_range`` keeps
    weights in 7 bits, so that sums of two products fit 16 bits. The nodes named ``keep_float`` stay
    in float. Raises UsageError if nncf is missing.
    """
    # Without NNCF_CI, NNCF sends usage statistics to Google Analytics.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            OverflowFix,
        )
    except ImportError as error:
        raise UsageError("OpenVINO models need nncf: pip install medspark[openvino].") from error
    data = nncf.Dataset([{"images": image[None]} for image in images])
    with _quiet():
        quantised = nncf.quantize(
            onnx.load_from_string(content),
            data,
            subset_size=len(images),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if reduce_range else OverflowFix.DISABLE
            ),
            ignored_scope=nncf.IgnoredScope(names=list(keep_float)) if keep_float else None,
        )
    found: bytes = quantised.SerializeToString()
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence NNCF's log and progress bars."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
