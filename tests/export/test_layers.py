"""Quantisation debugging finds the layer whose weights do not fit 8 bits."""

from __future__ import annotations

import torch
from networks import SIDE, images, network

from medspark.export.layers import layer_errors
from medspark.export.onnx import export_onnx
from medspark.export.quantise import Format, prepared, quantised


def test_the_layer_that_rounds_badly_has_the_largest_error() -> None:
    spoilt = network()
    stem = spoilt.backbone.get_submodule("conv1.0")
    with torch.no_grad():
        # Nearly nothing of smooth images passes these weights, but they set the step of rounding.
        stem.weight += 30 * torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])
    ready = prepared(export_onnx(spoilt, height=SIDE, width=SIDE))
    batch = images(16)

    errors = layer_errors(ready, quantised(ready, batch.numpy(), Format("U8", "S8", "QDQ")), batch)

    assert len(errors) == 16
    largest, second, *_ = errors.values()
    assert largest > 2 * second > 0
    assert "conv1.0/Conv" in next(iter(errors))


def test_a_layer_that_is_not_rounded_has_no_error() -> None:
    ready = prepared(export_onnx(network(), height=SIDE, width=SIDE))

    assert set(layer_errors(ready, ready, images(4)).values()) == {0.0}
