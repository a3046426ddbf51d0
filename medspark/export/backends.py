"""Make the graphs of each backend and precision from one float graph in ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from medspark.export.choose import Attempt, Candidate, Choice, Judge, choose
from medspark.export.openvino_graph import as_openvino, quantised_by_nncf
from medspark.export.packages import Backend
from medspark.export.processor import dot_product
from medspark.export.quantise import Calibration, Format, formats, prepared, quantised
from medspark.export.runtime import BIN, ONNX, XML, openvino_runner
from medspark.models.onnx_session import OnnxSession
from medspark.models.prediction import Floats

__all__ = ["float_graph", "int8_graph"]


def float_graph(backend: Backend, content: bytes) -> Candidate:
    """Return the ONNX graph ``content`` for ``backend``, in float32."""
    return _graph(backend, content, numbers="float32", surrogate=content)


def int8_graph(backend: Backend, content: bytes, images: Floats, judge: Judge) -> Choice:
    """Return the graph ``content`` in 8 bits for ``backend``, calibrated on ``images``.

    The format depends on this machine's processor.
    """
    ready = prepared(content)
    if backend == "openvino":

        def by_nncf(attempt: Attempt) -> Iterator[Candidate]:
            made = quantised_by_nncf(ready, images, keep_float=attempt.keep_float)
            yield _graph(backend, made, numbers=f"NNCF, {attempt}", surrogate=made)

        return choose(by_nncf, judge, prepared=ready)

    def in_every_format(attempt: Attempt) -> Iterator[Candidate]:
        twins: dict[Format, bytes] = {}
        for each in formats(dot_product=dot_product()):
            twin = each.as_qdq()
            if twin not in twins:
                twins[twin] = _quantised(ready, images, twin, attempt)
            made = twins[twin] if each == twin else _quantised(ready, images, each, attempt)
            yield _graph(backend, made, numbers=f"{each}, {attempt}", surrogate=twins[twin])

    return choose(in_every_format, judge, prepared=ready, calibrations=("MinMax", "Percentile"))


def _quantised(content: bytes, images: Floats, chosen: Format, attempt: Attempt) -> bytes:
    calibration = cast(Calibration, attempt.calibration)
    return quantised(
        content, images, chosen, calibration=calibration, keep_float=attempt.keep_float
    )


def _graph(backend: Backend, content: bytes, *, numbers: str, surrogate: bytes) -> Candidate:
    if backend == "onnxruntime":
        session = OnnxSession(content, name=f"the graph in {numbers}")
        return Candidate(numbers, {ONNX: content}, session, surrogate)
    files = as_openvino(content)
    run = openvino_runner(files[XML], files[BIN], name=f"the graph in {numbers}")
    return Candidate(numbers, files, run, surrogate)
