"""The torch twin of a quantised graph: the graph's answers, and gradients through its rounding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import SIDE, images, network
from onnx import TensorProto, helper, numpy_helper

from medspark.errors import UsageError
from medspark.export.onnx import export_onnx
from medspark.export.quantise import Format, prepared, quantised
from medspark.export.straight_through import StraightThrough
from medspark.models.onnx_session import OnnxSession

PREPARED = prepared(export_onnx(network(), height=SIDE, width=SIDE))
BATCH = images(16)


def test_a_float_graph_has_the_same_logits() -> None:
    found = StraightThrough(PREPARED)(BATCH)

    wanted = torch.from_numpy(OnnxSession(PREPARED, name="test")(BATCH.numpy()))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("signs", [("U8", "S8"), ("S8", "S8")])
def test_an_int8_graph_has_its_own_rounding_and_not_that_of_the_float_graph(signs) -> None:
    # With weights of 7 bits no processor saturates.
    graph = quantised(PREPARED, BATCH.numpy(), Format(*signs, "QDQ", reduce_range=True))

    deployed = OnnxSession(graph, name="test")(BATCH.numpy())
    twin = StraightThrough(graph)(BATCH).numpy()
    exact = OnnxSession(PREPARED, name="test")(BATCH.numpy())

    assert np.abs(twin - deployed).mean() < np.abs(exact - deployed).mean()


def test_gradients_pass_through_the_rounding_of_a_whole_graph() -> None:
    twin = StraightThrough(quantised(PREPARED, BATCH.numpy(), Format("U8", "S8", "QDQ")))
    pixels = BATCH.clone().requires_grad_(True)

    (gradient,) = torch.autograd.grad(twin(pixels).square().sum(), pixels)

    assert (gradient.flatten(1).abs().amax(1) > 0).all()


SCALE, ZERO = 0.5, 10  # of unsigned bytes: from -5 to 122.5


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=8))
def test_rounding_is_on_the_grid_and_has_gradient_one_inside_its_range(numbers) -> None:
    pixels = torch.tensor(numbers).requires_grad_(True)

    rounded = StraightThrough(_rounding())(pixels)
    (gradient,) = torch.autograd.grad(rounded.sum(), pixels)

    inside = (pixels >= (0 - ZERO) * SCALE) & (pixels <= (255 - ZERO) * SCALE)
    grid = (pixels / SCALE).round().clamp(-ZERO, 255 - ZERO) * SCALE
    torch.testing.assert_close(rounded, grid)
    assert torch.equal(gradient, inside.float())


def test_an_operator_without_counterpart_is_named() -> None:
    with pytest.raises(UsageError, match="gradients: Einsum has no counterpart"):
        StraightThrough(_rounding(more="Einsum"))


def _rounding(*, more: str = "Identity") -> bytes:
    """Return a graph that rounds its input, and then does one thing ``more``."""
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["stored"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["rounded"]),
        helper.make_node(more, ["rounded"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(SCALE), "scale"),
        numpy_helper.from_array(np.uint8(ZERO), "zero"),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("images", "logits")
    ]
    graph = helper.make_graph(nodes, "rounding", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert isinstance(model, onnx.ModelProto)
    return model.SerializeToString()
