"""A depthwise convolution with a wide kernel over few positions, with a faster weight gradient.

ConvNeXt's 7 x 7 layers see 8 x 8 to 2 x 2 positions at 64 pixels. oneDNN takes 7 to 8 ms for the
gradient of their weights there, twenty times as long as for that of their input. Here a channel's
gradient is the product of all its positions in the image with all those in the output's gradient,
summed over the images, of which those with the same offset are added up: 1.4 ms at 8 x 8, 0.5 at
4 x 4, 0.4 at 2 x 2 (batch 32, bf16, one thread of an AMD EPYC; in float32 1.6 to 2.6 times as fast
as oneDNN). A training step of ConvNeXt-pico takes .70 of the time in bf16, .96 in float32. For
3 x 3 layers oneDNN is faster.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.kernels.casts import as_autocast, cast_once
from medspark.models.kernels.matrix_conv import padding_of, torch_backward

__all__ = ["WideDepthwiseConv2d", "gains"]

_NARROWEST, _MOST_POSITIONS = 7, 64


def gains(conv: nn.Conv2d, *, positions: int) -> bool:
    """Return whether the depthwise ``conv`` of stride 1 is faster here over so many positions."""
    kernel = conv.kernel_size
    return (
        min(kernel) >= _NARROWEST
        and positions <= _MOST_POSITIONS
        and conv.out_channels == conv.groups
        and all(k == 2 * p + 1 for k, p in zip(kernel, padding_of(conv), strict=True))
    )


class WideDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 whose output has the size of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution (B, C, H, W) of ``input`` (B, C, H, W)."""
        if torch.compiler.is_compiling():
            return super().forward(input)  # the compiler generates its own kernels
        input = as_autocast(input)
        output: Tensor = _Depthwise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, padding_of(self)
        )
        return output


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.has_bias = padding, bias is not None
        cast = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, cast_once(weight, x.dtype), cast, padding=padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        # The gradient itself may be differentiated: then all of it is torch's own.
        own = not torch.is_grad_enabled()
        for_x, for_weight, for_bias = torch_backward(
            gradient, x, weight, padding=ctx.padding, groups=len(weight), bias=ctx.has_bias,
            # Asked for the gradient of the bias, oneDNN computes that of the weight as well.
            wanted=(wanted[0], False, False) if own else wanted,
        )  # fmt: skip
        if own and wanted[1]:
            for_weight = _weight_gradient(gradient, x, weight)
        if own and wanted[2]:
            for_bias = gradient.sum((0, 2, 3)).to(weight.dtype)
        return for_x, for_weight, for_bias, None


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    channels, _, kh, kw = weight.shape
    height, width = x.shape[2:]
    seen = x.permute(1, 2, 3, 0).reshape(channels, height * width, -1)
    answered = gradient.permute(1, 0, 2, 3).reshape(channels, -1, height * width)
    pairs = torch.bmm(seen, answered).view(channels, -1)
    return (pairs @ _offsets(height, width, kh, kw, x.dtype)).view_as(weight).to(weight.dtype)


@functools.lru_cache(maxsize=64)
def _offsets(height: int, width: int, kh: int, kw: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (H * W * H * W, kh * kw) that adds up the pairs of each offset.

    A pair is a position of the image and one of the output; their offset, where the kernel has it,
    is a column.
    """
    down = torch.arange(height)[:, None] - torch.arange(height) + kh // 2
    along = torch.arange(width)[:, None] - torch.arange(width) + kw // 2
    by_row = (down[..., None] == torch.arange(kh)).to(dtype)
    by_column = (along[..., None] == torch.arange(kw)).to(dtype)
    # Pairs of rows (a, c) and of columns (b, d), with the offsets i and j of both.
    return torch.einsum("aci,bdj->abcdij", by_row, by_column).reshape(-1, kh * kw)
