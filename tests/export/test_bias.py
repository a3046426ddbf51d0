"""Corrected biases take back what rounded weights do to the means of a graph."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SIDE, images, network

from medspark.export.bias import with_corrected_biases
from medspark.export.onnx import export_onnx
from medspark.export.quantise import Format, output_layer, prepared, quantised, shifted
from medspark.models.onnx_session import OnnxSession

READY = prepared(export_onnx(network(), height=SIDE, width=SIDE))
BATCH = images(32)
FORMAT = Format("U8", "S8", "QDQ")


def _logits(graph: bytes) -> np.ndarray:
    return OnnxSession(graph, name="test")(BATCH.numpy())


def test_the_mean_error_of_the_logits_is_nearly_gone() -> None:
    last = (output_layer(READY).name,)
    first = quantised(READY, BATCH.numpy(), FORMAT, keep_float=last)

    corrected = with_corrected_biases(READY, first, BATCH)
    second = quantised(corrected, BATCH.numpy(), FORMAT, keep_float=last)

    before, after = (np.abs((_logits(g) - _logits(READY)).mean(0)).max() for g in (first, second))
    assert after < before / 2


def test_biases_that_suit_the_float_weights_stay_as_they_are() -> None:
    same = with_corrected_biases(READY, READY, BATCH)

    np.testing.assert_allclose(_logits(same), _logits(READY), atol=1e-4)
    names = [tensor.name for tensor in onnx.load_from_string(same).graph.initializer]
    assert len(names) == len(set(names))


@given(st.floats(-10, 10), st.floats(-10, 10))
@settings(max_examples=10)
def test_a_shift_of_the_last_bias_is_one_of_the_logits(first: float, second: float) -> None:
    change = np.array([first, second], np.float32)

    moved = shifted(READY, output_layer(READY).name, change)

    np.testing.assert_allclose(_logits(moved), _logits(READY) + change, atol=1e-4)
    assert torch.isfinite(torch.from_numpy(_logits(moved))).all()
