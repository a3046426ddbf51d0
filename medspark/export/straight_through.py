"""A quantised ONNX graph in torch, with straight-through gradients (Bengio et al. 2013).

Rounding has no gradient, so gradient attacks on a quantised graph need this twin. It rounds as the
graph does in the forward pass. In the backward pass rounding has gradient 1 inside the range and 0
outside, which is BPDA (Athalye et al. 2018). The graph has ONNX's form QDQ: float operators between
QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from medspark.errors import UsageError

__all__ = ["Attributes", "Step", "StraightThrough", "along", "padded"]

Attributes = dict[str, Any]
Operator = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One node of the graph: its name, its operator, the names of its values, its attributes."""

    name: str
    operator: Operator
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes
    last_of: tuple[str, ...] = ()  # values that no later step needs

    def do(self, values: dict[str, Any]) -> Any:
        """Return the output; an input without a name is left out."""
        return self.operator(self.attributes, *(values[n] if n else None for n in self.inputs))


class StraightThrough(nn.Module):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], by the steps of an ONNX graph in torch."""

    def __init__(self, content: bytes) -> None:
        """Read the graph. Raises UsageError that names an operator without a torch counterpart."""
        super().__init__()
        graph = onnx.load_from_string(content).graph
        self._values: dict[str, Any] = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
        }
        self._input, self._output = graph.input[0].name, graph.output[0].name
        self._steps: list[Step] = []
        for node in _needed(graph):
            if node.op_type not in _OPERATORS:
                raise UsageError(
                    f"The quantised graph cannot be attacked by gradients: {node.op_type} has no "
                    "counterpart in medspark's torch twin."
                )
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            step = Step(
                node.name, _OPERATORS[node.op_type], tuple(node.input), node.output[0], attributes
            )  # fmt: skip
            if all(not name or name in self._values for name in node.input):
                self._values[step.output] = step.do(self._values)  # weights
            else:
                self._steps.append(step)
        self._steps = _freeing(self._steps)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        values: dict[str, Any] = {}
        for _, values in self.walk(images):  # noqa: B007 - the last ones are needed
            pass
        logits: Tensor = values[self._output]
        return logits

    def walk(self, images: Tensor) -> Iterator[tuple[Step, dict[str, Any]]]:
        """Yield every step after it was done, and its values, which the caller may change.

        A value is gone once no later step needs it.
        """
        values = self._values | {self._input: images}
        for step in self._steps:
            values[step.output] = step.do(values)
            yield step, values
            for name in step.last_of:
                del values[name]


def _freeing(steps: list[Step]) -> list[Step]:
    """Return ``steps``, each with the names of the values that it is the last to need."""
    needed: set[str] = set()
    found = []
    for step in reversed(steps):
        names = set(step.inputs) - needed - {""}
        found.append(replace(step, last_of=tuple(sorted(names))))
        needed |= names
    return found[::-1]


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that the output depends on, in their order."""
    wanted, found = {graph.output[0].name}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(node)
    return found[::-1]


def _straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return the value of ``rounded`` with the gradient of ``exact``."""
    return exact + (rounded - exact).detach()


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return ``values``, one number or one for each index of ``axis``, in a shape for ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def _quantize(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    limits, axis = torch.iinfo(zero.dtype), a.get("axis", 1)
    exact = x / along(scale, x, axis) + along(zero.float(), x, axis)
    inside = exact.clamp(limits.min, limits.max)
    return _straight_through(inside, exact.round().clamp(limits.min, limits.max))


def _dequantize(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis, shifted = a.get("axis", 1), x.float()
    if zero is not None:
        shifted = shifted - along(zero.float(), x, axis)
    return shifted * along(scale, x, axis)


def padded(a: Attributes, x: Tensor, *, value: float = 0.0) -> Tensor:
    """Return images (B, C, H, W) with the padding of a node's attributes around them."""
    pads = a.get("pads", [0, 0, 0, 0])
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value) if any(pads) else x


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(
        padded(a, x), weight, bias, stride=tuple(a.get("strides", (1, 1))),
        dilation=tuple(a.get("dilations", (1, 1))), groups=a.get("group", 1),
    )  # fmt: skip


def _gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.mT if a.get("transA") else x
    product: Tensor = a.get("alpha", 1.0) * (x @ (weight.mT if a.get("transB") else weight))
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _norm(
    a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, training=False, eps=a.get("epsilon", 1e-5))


def _clip(
    _: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    return x.clamp(None if low is None else float(low), None if high is None else float(high))


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    bordered = padded(a, x, value=-torch.inf)
    return F.max_pool2d(
        bordered, tuple(a["kernel_shape"]), tuple(a.get("strides", (1, 1))),
        ceil_mode=bool(a.get("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    pads, counts = a.get("pads", [0, 0, 0, 0]), bool(a.get("count_include_pad", 0))
    return F.avg_pool2d(
        x, tuple(a["kernel_shape"]), tuple(a.get("strides", (1, 1))), padding=tuple(pads[:2]),
        ceil_mode=bool(a.get("ceil_mode", 0)), count_include_pad=counts,
    )  # fmt: skip


def _reduce_mean(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = a.get("axes") or (None if axes is None else axes.tolist())
    return x.mean(dims, keepdim=bool(a.get("keepdims", 1)))


def _reshape(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[d] if size == 0 else size for d, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(x.shape[:axis].numel(), -1)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    alpha, beta = float(a.get("alpha", 0.2)), float(a.get("beta", 0.5))
    return (alpha * x + beta).clamp(0, 1)


def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    before, after = a.get("pads", [0, 0, 0, 0])[:2], a.get("output_padding", [0, 0])
    return F.conv_transpose2d(
        x, weight, bias, stride=tuple(a.get("strides", (1, 1))), padding=tuple(before),
        output_padding=tuple(after), groups=a.get("group", 1),
    )  # fmt: skip


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    sizes = x.shape[a.get("axis", -1) :]
    return F.layer_norm(x, sizes, scale, bias, eps=a.get("epsilon", 1e-5))


_OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda _, x, y: x @ y,
    "BatchNormalization": _norm,
    "Relu": lambda _, x: x.relu(),
    "Clip": _clip,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _, x: F.hardswish(x),
    "Add": lambda _, x, y: x + y,
    "Sub": lambda _, x, y: x - y,
    "Mul": lambda _, x, y: x * y,
    "Div": lambda _, x, y: x / y,
    "Concat": lambda a, *xs: torch.cat(xs, dim=a["axis"]),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "ConvTranspose": _conv_transpose,
    "LayerNormalization": _layer_norm,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Erf": lambda _, x: x.erf(),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Constant": lambda a: torch.from_numpy(numpy_helper.to_array(a["value"]).copy()),
    "Identity": lambda _, x: x,
}
