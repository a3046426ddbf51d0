"""Correct the biases of a graph for the rounding of its weights (Nagel et al. 2019).

Rounded weights change the mean of each output channel, most where inputs are large and their
products cancel. The biases take the change back, layer by layer.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from medspark.export.quantise import LAYERS
from medspark.export.straight_through import StraightThrough

__all__ = ["with_corrected_biases"]

_PIXELS = 1 << 19  # of the images that the means are taken over, which bounds the memory


@torch.no_grad()
def with_corrected_biases(prepared: bytes, quantised: bytes, images: Tensor) -> bytes:
    """Return the float graph ``prepared`` with biases that suit the weights of ``quantised``.

    Each layer of ``quantised``, which has the form QDQ, then has the mean of the float layer in
    every channel, over ``images`` (B, C, H, W) and behind the layers that were corrected before.
    """
    few = images[: max(8, _PIXELS // images[0, 0].numel())]
    layers = _layers(prepared)
    wanted = {
        step.name: _mean(values[step.output])
        for step, values in StraightThrough(prepared).walk(few)
        if step.name in layers
    }
    changes = {}
    for step, values in StraightThrough(quantised).walk(few):
        if step.name in wanted:
            output = values[step.output]
            change = wanted[step.name] - _mean(output)
            values[step.output] = output + change.view(-1, *[1] * (output.ndim - 2))
            changes[step.name] = change.numpy()
    return _with_biases(prepared, changes)


def _layers(content: bytes) -> set[str]:
    """Return the names of the layers that have a bias, or can have one."""
    nodes = onnx.load_from_string(content).graph.node
    return {node.name for node in nodes if node.op_type in LAYERS and node.op_type != "MatMul"}


def _mean(output: Tensor) -> Tensor:
    """Return the mean of each channel (C,) of an output (B, C, ...)."""
    return output.transpose(0, 1).flatten(1).mean(1)


def _with_biases(content: bytes, changes: dict[str, np.ndarray]) -> bytes:  # type: ignore[type-arg]
    """Return the graph with ``changes`` added to the biases of its layers."""
    model = onnx.load_from_string(content)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name in changes:
            old = constants.get("".join(node.input[2:3]))
            bias = changes[node.name] + (0 if old is None else numpy_helper.to_array(old))
            name = f"{node.name}/bias"  # a tensor of its own: layers may share the old one
            model.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), name))
            node.input[:] = [*node.input[:2], name]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    found: bytes = model.SerializeToString()
    return found
