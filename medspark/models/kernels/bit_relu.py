"""ReLU on the bits of bf16 numbers, without torch's conversion to float32 and back.

Read as a 16-bit integer, a bf16 number keeps its sign, so a comparison suffices. Measured with one
thread on 2048 x 320: forward 0.07 ms instead of 0.29, backward 0.13 ms instead of 0.38.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_", "relu_"]

# Minus infinity as an integer. Larger integers are positive numbers and NaN.
_LOWEST = -128


def relu_(x: Tensor) -> Tensor:
    """Set the negative elements of ``x`` to zero, in place; NaN stays."""
    if x.dtype != torch.bfloat16:
        return x.relu_()
    F.threshold(x.view(torch.int16), _LOWEST, 0, inplace=True)
    return x


def block_(gradient: Tensor, output: Tensor) -> Tensor:
    """Set ``gradient`` to zero where the ``output`` of ReLU is zero, in place."""
    ints = (gradient, output)
    if gradient.dtype == torch.bfloat16:
        ints = (gradient.view(torch.int16), output.view(torch.int16))
    torch.ops.aten.threshold_backward.grad_input(*ints, 0, grad_input=ints[0])
    return gradient
