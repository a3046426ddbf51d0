"""Quantise an ONNX graph to 8 bits for onnxruntime: static, per channel, in several formats.

The ranges of the activations come from calibration images (Jacob et al. 2018). Which format is
fastest depends on the processor, and which one keeps the answers on the network: all are tried.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

__all__ = [
    "LAYERS", "Format", "formats", "output_layer", "prepared", "quantised",
    "shifted",
]  # fmt: skip

LAYERS = ("Conv", "Gemm", "MatMul")
_BATCH = 16  # calibration images at once

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """How 8 bits are stored: signs of activations and weights, and the form of the graph.

    ``reduce_range`` keeps weights in 7 bits, so that sums of two products fit 16 bits.
    """

    activations: Literal["U8", "S8"]
    weights: Literal["U8", "S8"]
    form: Literal["QOperator", "QDQ"]
    reduce_range: bool = False

    def as_qdq(self) -> Format:
        """Return the format of the same numbers in the form QDQ."""
        return replace(self, form="QDQ")

    def __str__(self) -> str:
        bits = ", weights of 7 bits" if self.reduce_range else ""
        return f"{self.activations}{self.weights} {self.form}{bits}"


def formats(*, dot_product: str) -> tuple[Format, ...]:
    """Return the formats to try on a processor with these instructions, "" for none.

    Without them, x86 saturates sums of U8S8 products unless the weights have 7 bits.
    """
    if dot_product in ("neon", "asimddp", "i8mm"):
        return Format("S8", "S8", "QDQ"), Format("S8", "S8", "QOperator"), Format("U8", "S8", "QDQ")
    narrow = not dot_product
    tried = [
        Format("U8", "S8", "QOperator", narrow),
        Format("U8", "S8", "QDQ", narrow),
        Format("S8", "S8", "QDQ", narrow),
    ]
    return tuple(tried if dot_product else [*tried, Format("U8", "U8", "QOperator")])


def prepared(content: bytes) -> bytes:
    """Return the float graph ready for quantisation: batch norms folded, shapes inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "prepared.onnx")
        source.write_bytes(content)
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return target.read_bytes()


def output_layer(content: bytes) -> onnx.NodeProto:
    """Return the node that computes the logits: the last layer with weights."""
    nodes: list[onnx.NodeProto] = list(onnx.load_from_string(content).graph.node)
    return next(node for node in reversed(nodes) if node.op_type in LAYERS)


def shifted(content: bytes, layer: str, change: npt.NDArray[np.float32]) -> bytes:
    """Return the graph with ``change`` added to the bias of ``layer``, if that is in float."""
    model = onnx.load_from_string(content)
    (node,) = (node for node in model.graph.node if node.name == layer)
    for tensor in model.graph.initializer:
        if tensor.name in node.input[2:3] and tensor.data_type == onnx.TensorProto.FLOAT:
            moved = numpy_helper.to_array(tensor) + change
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    found: bytes = model.SerializeToString()
    return found


def quantised(
    content: bytes,
    images: Images,
    chosen: Format,
    *,
    keep_float: Sequence[str] = (),
) -> bytes:
    """Return the ``prepared`` graph in 8 bits, calibrated on ``images`` (N, C, H, W) in [0, 1].

    The nodes named ``keep_float`` stay in float.
    """
    from onnxruntime.quantization import (
        QuantFormat,
        QuantType,
        quantize_static,
    )

    types = {"U8": QuantType.QUInt8, "S8": QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        quantize_static(
            str(source),
            str(target),
            _reader(images),
            quant_format=QuantFormat[chosen.form],
            activation_type=types[chosen.activations],
            weight_type=types[chosen.weights],
            per_channel=True,
            reduce_range=chosen.reduce_range,
            nodes_to_exclude=list(keep_float),
        )
        return target.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantiser's warnings about graphs that it prepared itself."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def _reader(images: Images) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the images in batches; the quantiser asks for None at the end."""

        def __init__(self) -> None:
            self._batches: Iterator[Images] = iter(
                np.array_split(images, max(1, len(images) // _BATCH))
            )

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    return Reader()
