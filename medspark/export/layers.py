"""Quantisation debugging: how much of the error in the logits comes from each layer."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor

from medspark.export.quantise import LAYERS
from medspark.export.straight_through import StraightThrough

__all__ = ["layer_errors"]


_MARK = "rounded/"  # before the names of the quantised graph's values


@torch.no_grad()
def layer_errors(prepared: bytes, quantised: bytes, images: Tensor) -> dict[str, float]:
    """Return the error of each layer by the name of its node, the largest first.

    For each layer, the float graph ``prepared`` runs with the 8-bit weights and inputs of this one
    layer, as they are in ``quantised``, which has the form QDQ. The error is the standard deviation
    of the change of the logits over ``images`` (B, C, H, W), relative to that of the logits. The
    mean change does not count, because the biases take it back.
    """
    logits = StraightThrough(prepared)(images)
    spread = _deviation(logits).clamp_min(1e-12)
    graph = onnx.load_from_string(quantised).graph
    errors = {}
    for name in [node.name for node in graph.node if node.op_type in LAYERS]:
        alone = StraightThrough(_alone(name, prepared, graph))
        errors[name] = float(_deviation(alone(images) - logits) / spread)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _deviation(values: Tensor) -> Tensor:
    """Return the standard deviation of ``values`` (B, K) from the mean of each column."""
    return (values - values.mean(0)).square().mean().sqrt()


def _alone(layer: str, original: bytes, quantised: onnx.GraphProto) -> bytes:
    """Return the graph ``original`` whose node ``layer`` gets its inputs as in ``quantised``."""
    model = onnx.load_from_string(original)
    nodes = model.graph.node
    made_by = {output: node for node in quantised.node for output in node.output}
    place = next(place for place, node in enumerate(nodes) if node.name == layer)
    rounded = next(node for node in quantised.node if node.name == layer)
    chain: list[onnx.NodeProto] = []
    for number, name in enumerate(rounded.input[:2]):  # the bias may be corrected for all layers
        dequantise = made_by.get(name)
        if dequantise is None or dequantise.op_type != "DequantizeLinear":
            continue
        quantise = made_by.get(dequantise.input[0])  # None: a weight is stored in 8 bits
        if quantise is not None:
            chain.append(_renamed(quantise, first=nodes[place].input[number]))
        first = None if quantise is None else chain[-1].output[0]
        chain.append(_renamed(dequantise, first=first))
        nodes[place].input[number] = chain[-1].output[0]
    for node in reversed(chain):
        nodes.insert(place, node)
    for tensor in quantised.initializer:
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = _MARK + tensor.name
    content: bytes = model.SerializeToString()
    return content


def _renamed(node: onnx.NodeProto, *, first: str | None) -> onnx.NodeProto:
    """Return a copy of ``node`` with new names; its first input is ``first`` if given."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    copied.input[:] = [_MARK + name for name in node.input]
    copied.output[:] = [_MARK + name for name in node.output]
    if first is not None:
        copied.input[0] = first
    return copied
