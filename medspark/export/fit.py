"""Fit a float graph to the grid of its 8-bit form, layer by layer.

Weights that are rounded to the nearest step change an output most where its inputs vary together:
their errors add up. So the weights of a convolution are rounded together, and the bias takes back
what is left of the mean change in each channel (Nagel et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from medspark.export.quantise import LAYERS
from medspark.export.rounding import rounded_together
from medspark.export.straight_through import Attributes, StraightThrough, along, padded

__all__ = ["fitted"]

_PIXELS = 1 << 21  # of the images that the statistics are taken over, which bounds the time
_PATCHES = 1 << 14  # of a layer's inputs, likewise


@torch.no_grad()
def fitted(prepared: bytes, quantised: bytes, images: Tensor) -> bytes:
    """Return the float graph ``prepared`` with weights and biases that suit ``quantised``.

    ``quantised`` is its 8-bit form, as QDQ. The weights lie on its grid, so that quantising the
    result rounds none of them, except those at the ends of a range: they set the grid, and stay
    as they are. In every channel each layer's output has the mean of the float
    layer, over ``images`` (B, C, H, W) and behind the layers that were fitted before.
    """
    few = images[: max(8, _PIXELS // images[0, 0].numel())]
    layers, grids = _layers(prepared), _grids(prepared, quantised)
    wanted = {
        step.name: _mean(values[step.output])
        for step, values in StraightThrough(prepared).walk(few)
        if step.name in layers
    }
    weights, changes = {}, {}
    for step, values in StraightThrough(quantised).walk(few):
        if step.name in grids:
            grid = grids[step.name]
            rounded = grid.rounded(step.attributes, values[step.inputs[0]])
            weights[step.name] = torch.where(grid.ends, grid.exact, rounded)
            values[step.output] = step.do({**values, step.inputs[1]: rounded})
        if step.name in wanted:
            output = values[step.output]
            change = wanted[step.name] - _mean(output)
            values[step.output] = output + change.view(-1, *[1] * (output.ndim - 2))
            changes[step.name] = change
    return _with_constants(prepared, weights, changes)


class _Grid:
    """The float weights of a convolution (O, I, H, W), and the 8-bit grid that they are put on."""

    def __init__(self, exact: Tensor, stored: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take the nearest whole numbers ``stored``, and the grid's ``scale`` and ``zero``."""
        self.exact = exact
        self._scale, zero = (along(each.float(), exact, 0) for each in (scale, zero))
        steps = (exact / self._scale).flatten(1)
        low, high = steps.aminmax(dim=1, keepdim=True)
        if not zero.any():  # the range is symmetric
            high = torch.maximum(high, -low)
            low = -high
        ends = (steps == low) | (steps == high)  # they set the scale
        nearest = (stored.float() - zero).flatten(1)
        self._low = torch.where(ends, nearest, low.ceil())
        self._high = torch.where(ends, nearest, high.floor())
        self.ends = ends.view_as(exact)

    def rounded(self, a: Attributes, inputs: Tensor) -> Tensor:
        """Return the weights on the grid that suit the layer's ``inputs`` (B, C, H, W)."""
        rows = a.get("group", 1), len(self.exact) // a.get("group", 1), -1
        found = rounded_together(
            (self.exact / self._scale).reshape(rows),
            _covariance(a, inputs, self.exact.shape),
            low=self._low.reshape(rows),
            high=self._high.reshape(rows),
        )
        return found.reshape(self.exact.shape) * self._scale


def _grids(prepared: bytes, quantised: bytes) -> dict[str, _Grid]:
    """Return the grid of every convolution with 8-bit weights, by the name of its node."""
    original, graph = (onnx.load_from_string(each).graph for each in (prepared, quantised))
    floats, constants = _constants(original), _constants(graph)
    exact = {
        node.name: floats[node.input[1]] for node in original.node
        if node.op_type == "Conv" and node.input[1] in floats
    }  # fmt: skip
    made_by = {output: node for node in graph.node for output in node.output}
    grids = {}
    for node in graph.node:
        maker = made_by.get(node.input[1]) if node.name in exact else None
        if maker is not None and maker.input[0] in constants:
            stored, scale, *zero = (constants[name] for name in maker.input)
            grids[node.name] = _Grid(
                exact[node.name], stored, scale, zero[0] if zero else torch.zeros(())
            )
    return grids


def _covariance(a: Attributes, inputs: Tensor, shape: torch.Size) -> Tensor:
    """Return the covariance (G, D, D) of the inputs that a convolution's kernel is laid on."""
    groups, strides = a.get("group", 1), tuple(a.get("strides", (1, 1)))
    places = inputs[0, 0].numel() // (strides[0] * strides[1])
    few = padded(a, inputs[: max(8, _PATCHES // max(1, places))])
    columns = F.unfold(
        few, tuple(shape[2:]), dilation=tuple(a.get("dilations", (1, 1))), stride=strides
    )
    patches = columns.view(len(few), groups, -1, columns.shape[2]).permute(1, 2, 0, 3).flatten(2)
    centred = patches - patches.mean(2, keepdim=True)
    return centred @ centred.mT / centred.shape[2]


def _layers(content: bytes) -> set[str]:
    """Return the names of the layers that have a bias, or can have one."""
    nodes = onnx.load_from_string(content).graph.node
    return {node.name for node in nodes if node.op_type in LAYERS and node.op_type != "MatMul"}


def _constants(graph: onnx.GraphProto) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }


def _mean(output: Tensor) -> Tensor:
    """Return the mean of each channel (C,) of an output (B, C, ...)."""
    return output.transpose(0, 1).flatten(1).mean(1)


def _with_constants(
    content: bytes, weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> bytes:
    """Return the graph with new ``weights``, and with ``changes`` added to the biases."""
    model = onnx.load_from_string(content)
    constants = _constants(model.graph)
    for node in model.graph.node:
        # Tensors of their own: layers may share the old ones.
        if node.name in weights:
            node.input[1] = _stored(model, f"{node.name}/weight", weights[node.name])
        if node.name in changes:
            old = constants.get("".join(node.input[2:3]), torch.zeros(()))
            bias = _stored(model, f"{node.name}/bias", old + changes[node.name])
            node.input[:] = [*node.input[:2], bias]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    found: bytes = model.SerializeToString()
    return found


def _stored(model: onnx.ModelProto, name: str, values: Tensor) -> str:
    """Add a constant to the graph, and return its name."""
    array = values.numpy().astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name
