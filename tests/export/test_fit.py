"""A fitted float graph lies on the 8-bit grid, and keeps its answers there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SIDE, images, network
from onnx import numpy_helper

from medspark.export.fit import fitted
from medspark.export.onnx import export_onnx
from medspark.export.openvino_graph import quantised_by_nncf
from medspark.export.quantise import Format, output_layer, prepared, quantised, shifted
from medspark.export.straight_through import StraightThrough
from medspark.models.onnx_session import OnnxSession

READY = prepared(export_onnx(network(), height=SIDE, width=SIDE))
LAST = (output_layer(READY).name,)
BATCH = images(32)
FORMAT = Format("U8", "S8", "QDQ")
CONVOLUTIONS = {n.name for n in onnx.load_from_string(READY).graph.node if n.op_type == "Conv"}


def _logits(graph: bytes) -> np.ndarray:
    return StraightThrough(graph)(BATCH).detach().numpy()


def _in_8_bits(graph: bytes, chosen: Format = FORMAT) -> bytes:
    return quantised(graph, BATCH.numpy(), chosen, keep_float=LAST)


def test_the_errors_of_the_logits_are_smaller_and_their_mean_is_nearly_gone() -> None:
    first = _in_8_bits(READY)

    second = _in_8_bits(fitted(READY, first, BATCH))

    before, after = (_logits(graph) - _logits(READY) for graph in (first, second))
    assert np.abs(after.mean(0)).max() < np.abs(before.mean(0)).max() / 2
    assert after.std(0).max() < before.std(0).max()


def test_every_channel_has_nearly_the_mean_of_the_float_layer() -> None:
    bright = 0.9 + 0.1 * BATCH  # means weigh more than differences

    def means(graph: bytes) -> torch.Tensor:
        walked = StraightThrough(graph).walk(bright)
        found = {step.name: values[step.output].mean((0, 2, 3)) for step, values in walked
                 if step.name in CONVOLUTIONS}  # fmt: skip
        return torch.cat([found[name] for name in sorted(CONVOLUTIONS)])

    first = quantised(READY, bright.numpy(), FORMAT, keep_float=LAST)
    graph = fitted(READY, first, bright)
    second = quantised(graph, bright.numpy(), FORMAT, keep_float=LAST)

    before, after = (float((means(g) - means(READY)).abs().mean()) for g in (first, second))
    assert after < before / 8


@pytest.mark.parametrize(
    "chosen",
    [
        FORMAT,
        Format("S8", "S8", "QDQ"),
        Format("U8", "S8", "QDQ", reduce_range=True),
        Format("U8", "U8", "QDQ"),
    ],
    ids=str,
)
def test_the_quantiser_rounds_no_fitted_weight_but_the_ends(chosen: Format) -> None:
    on_grid = fitted(READY, _in_8_bits(READY, chosen), BATCH)

    rounded = StraightThrough(_in_8_bits(on_grid, chosen))

    _rounds_but_the_ends(StraightThrough(on_grid), rounded)


def test_nncf_rounds_no_fitted_weight_but_the_ends() -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    on_grid = fitted(READY, quantised_by_nncf(READY, BATCH.numpy(), keep_float=LAST), BATCH)

    rounded = quantised_by_nncf(on_grid, BATCH.numpy(), keep_float=LAST)

    _rounds_but_the_ends(StraightThrough(on_grid), StraightThrough(rounded))


def _rounds_but_the_ends(one: StraightThrough, other: StraightThrough) -> None:
    """Assert that the weights of both are equal, except at the ends of a channel's range."""
    weights = [
        {step.name: values[step.inputs[1]] for step, values in each.walk(BATCH[:1])
         if "Conv" in step.name and len(step.inputs) > 1 and values[step.inputs[1]].ndim == 4}
        for each in (one, other)
    ]  # fmt: skip
    layers = [name for name in weights[0] if name in weights[1]]
    assert len(layers) > 5
    for name in layers:
        new, stored = (each[name].flatten(1) for each in weights)
        low, high = (each[:, None] for each in new.aminmax(dim=1))
        step = torch.maximum(high - low, high.abs()) / 120
        moved = (new - stored).abs() > 0.01 * step
        assert not (moved & (new > low + step) & (new < high - step)).any()


def test_a_graph_that_is_not_rounded_stays_as_it_is() -> None:
    same = fitted(READY, READY, BATCH)

    np.testing.assert_allclose(_logits(same), _logits(READY), atol=1e-4)
    names = [tensor.name for tensor in onnx.load_from_string(same).graph.initializer]
    assert len(names) == len(set(names))


def test_the_largest_weight_of_a_channel_which_sets_the_grid_stays() -> None:
    graphs = [
        onnx.load_from_string(g).graph for g in (READY, fitted(READY, _in_8_bits(READY), BATCH))
    ]
    old, new = ({t.name: numpy_helper.to_array(t) for t in g.initializer} for g in graphs)

    for node in (node for node in graphs[0].node if node.op_type == "Conv"):
        before, after = old[node.input[1]], new[f"{node.name}/weight"]
        largest = [np.abs(each).max(axis=(1, 2, 3)) for each in (before, after)]
        np.testing.assert_array_equal(*largest)


@given(st.floats(-10, 10), st.floats(-10, 10))
@settings(max_examples=10)
def test_a_shift_of_the_last_bias_is_one_of_the_logits(first: float, second: float) -> None:
    change = np.array([first, second], np.float32)

    moved = OnnxSession(shifted(READY, LAST[0], change), name="test")(BATCH.numpy())

    np.testing.assert_allclose(moved, _logits(READY) + change, atol=1e-4)
