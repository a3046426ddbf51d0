"""Make the graphs of each backend and precision from one float graph in ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from medspark.export.choose import Attempt, Candidate, Choice, choose
from medspark.export.fit import fitted
from medspark.export.judge import Judge, in_batches
from medspark.export.openvino_graph import as_openvino, quantised_by_nncf
from medspark.export.packages import Backend
from medspark.export.processor import dot_product
from medspark.export.quantise import (
    Format,
    formats,
    output_layer,
    prepared,
    quantised,
    shifted,
)
from medspark.export.runtime import BIN, ONNX, XML, openvino_runner
from medspark.models.onnx_session import OnnxSession
from medspark.models.prediction import Floats

__all__ = ["float_graph", "int8_graph"]


def float_graph(backend: Backend, content: bytes) -> Candidate:
    """Return the ONNX graph ``content`` for ``backend``, in float32."""
    return _graph(backend, content, numbers="float32", surrogate=content)


def int8_graph(backend: Backend, content: bytes, images: Floats, judges: Sequence[Judge]) -> Choice:
    """Return the graph ``content`` in 8 bits for ``backend``, calibrated on ``images``.

    The formats to try depend on this machine's processor. The layer that computes the logits stays
    in float: that costs no time, and logits rounded to 256 steps would change the answers to images
    near the decision boundary. The other layers are fitted to the 8-bit grid
    (medspark/export/fit.py).
    """
    bench = _Bench(backend, prepared(content), images)
    make = bench.by_nncf if backend == "openvino" else bench.in_every_format
    return choose(make, judges, prepared=bench.ready)


class _Bench:
    """A float graph prepared for quantisation, and the calibration images."""

    def __init__(self, backend: Backend, ready: bytes, images: Floats) -> None:
        self._backend, self.ready, self._images = backend, ready, images
        self._logits = in_batches(float_graph("onnxruntime", ready).run, images)
        self._last = output_layer(ready).name

    def by_nncf(self, attempt: Attempt) -> Iterator[Candidate]:
        """Yield the graph that NNCF makes."""
        narrow = not dot_product()
        kept = (self._last, *attempt.keep_float)
        make = partial(quantised_by_nncf, images=self._images, reduce_range=narrow, keep_float=kept)
        made = make(self._fitted(make(self.ready)))
        bits = ", weights of 7 bits" if narrow else ""
        yield self._corrected(f"NNCF{bits}, {attempt}", made, made)

    def in_every_format(self, attempt: Attempt) -> Iterator[Candidate]:
        """Yield onnxruntime's graph in every format that suits the processor."""
        fits: dict[tuple[str, bool], bytes] = {}  # by the grid of the weights
        twins: dict[Format, bytes] = {}
        tried = formats(dot_product=dot_product())
        # The first two store the same numbers. The others are slower and no more accurate.
        for each in tried[:2] if attempt.keep_float else tried:
            twin, grid = each.as_qdq(), (each.weights, each.reduce_range)
            if grid not in fits:
                fits[grid] = self._fitted(self._quantised(self.ready, twin, attempt))
            if twin not in twins:
                twins[twin] = self._quantised(fits[grid], twin, attempt)
            made = twins[twin] if each == twin else self._quantised(fits[grid], each, attempt)
            yield self._corrected(f"{each}, {attempt}", made, twins[twin])

    def _fitted(self, first: bytes) -> bytes:
        """Return the float graph with weights and biases that suit its 8-bit form ``first``."""
        return fitted(self.ready, first, torch.from_numpy(self._images))

    def _quantised(self, ready: bytes, chosen: Format, attempt: Attempt) -> bytes:
        kept = (self._last, *attempt.keep_float)
        return quantised(ready, self._images, chosen, keep_float=kept)

    def _corrected(self, numbers: str, content: bytes, surrogate: bytes) -> Candidate:
        """Return the graph with the float graph's mean logits on the calibration images."""
        run = _graph(self._backend, content, numbers=numbers, surrogate=surrogate).run
        change = (self._logits - in_batches(run, self._images)).mean(axis=0)
        moved, twin = (shifted(each, self._last, change) for each in (content, surrogate))
        return _graph(self._backend, moved, numbers=numbers, surrogate=twin)


def _graph(backend: Backend, content: bytes, *, numbers: str, surrogate: bytes) -> Candidate:
    if backend == "onnxruntime":
        session = OnnxSession(content, name=f"the graph in {numbers}")
        return Candidate(numbers, {ONNX: content}, session, surrogate)
    files = as_openvino(content)
    run = openvino_runner(files[XML], files[BIN], name=f"the graph in {numbers}")
    return Candidate(numbers, files, run, surrogate)
