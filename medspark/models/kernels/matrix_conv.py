"""A convolution computed as a matrix product, with explicit gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.kernels.casts import as_autocast, cast_once

__all__ = ["MatrixConv2d", "as_matrix", "padding_of", "rows_of", "torch_backward"]


class MatrixConv2d(nn.Conv2d):
    """A convolution that multiplies its unfolded, channels-last input by its weight matrix."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution (B, O, H', W') of ``input`` (B, C, H, W)."""
        if torch.compiler.is_compiling():
            return super().forward(input)  # the compiler generates its own kernels
        input = as_autocast(input)
        matrix = cast_once(self.weight, input.dtype, as_matrix)
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, matrix, self.stride, padding_of(self)
        )
        return product


def as_matrix(weight: Tensor) -> Tensor:
    """Return a convolution's ``weight`` (O, C, kh, kw) as the matrix (O, kh * kw * C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class _Product(torch.autograd.Function):
    """The matrix product of a convolution, with explicit gradients.

    With autograd, the returned image would be a view of the product. An in-place activation on a
    view costs a copy, and loses the memory layout of the gradients before it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        windows = _windows(x.permute(0, 2, 3, 1), weight.shape[2:], stride, padding)
        batch, height, width, length = windows.shape
        output = torch.empty(
            (batch, len(weight), height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        rows, products = windows.reshape(-1, length), rows_of(output)
        if bias is None:
            torch.mm(rows, matrix.t(), out=products)
        else:
            torch.addmm(bias.to(x.dtype), rows, matrix.t(), out=products)
        ctx.save_for_backward(x, weight, rows, matrix)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rows, matrix = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # The gradient itself will be differentiated: use torch's own backward.
            found = torch_backward(
                gradient, x, weight, stride=ctx.stride, padding=ctx.padding, bias=ctx.has_bias,
                wanted=wanted,
            )  # fmt: skip
            return *found, None, None, None
        out, channels, kh, kw = weight.shape
        along = gradient.permute(0, 2, 3, 1)
        flat = along.reshape(-1, out)
        for_x = for_weight = for_bias = None
        if wanted[0]:
            products = torch.mm(flat, matrix).view(*along.shape[:3], kh, kw, channels)
            for_x = _sum_windows(products, x.shape, ctx.stride, ctx.padding)
        if wanted[1]:
            product = torch.mm(flat.t(), rows).view(out, kh, kw, channels)
            for_weight = product.permute(0, 3, 1, 2).to(weight.dtype)
        if wanted[2]:
            for_bias = flat.sum(0).to(weight.dtype)
        return for_x, for_weight, for_bias, None, None, None


def rows_of(image: Tensor) -> Tensor:
    """Return a channels-last ``image`` (B, C, H, W) as a matrix (B * H * W, C), without a copy."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1])


def _windows(
    x: Tensor, kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return the windows (B, H', W', kh * kw * C) of the output positions in ``x`` (B, H, W, C)."""
    (kh, kw), (sy, sx), (py, px) = kernel, stride, padding
    if py or px:
        x = F.pad(x, (0, 0, px, px, py, py))
    height, width = (x.shape[1] - kh) // sy + 1, (x.shape[2] - kw) // sx + 1
    seen = [
        x[:, i : i + sy * (height - 1) + 1 : sy, j : j + sx * (width - 1) + 1 : sx]
        for i in range(kh)
        for j in range(kw)
    ]
    return seen[0] if len(seen) == 1 else torch.cat(seen, dim=-1)


def _sum_windows(
    products: Tensor, shape: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return an image of ``shape``: the sum of ``products`` (B, H', W', kh, kw, C) per window."""
    batch, height, width, kh, kw, channels = products.shape
    (sy, sx), (py, px) = stride, padding
    if (kh, kw, sy, sx, py, px) == (1, 1, 1, 1, 0, 0):
        return products.view(batch, height, width, channels).permute(0, 3, 1, 2)
    tall, wide = shape[2] + 2 * py, shape[3] + 2 * px
    total = products.new_zeros(batch, tall, wide, channels)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i, i + sy * (height - 1) + 1, sy)
            columns = slice(j, j + sx * (width - 1) + 1, sx)
            total[:, rows, columns] += products[:, :, :, i, j]
    return total[:, py : tall - py, px : wide - px].permute(0, 3, 1, 2)


def torch_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    padding: tuple[int, int],
    bias: bool,
    wanted: Sequence[bool],
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return torch's gradients of ``x``, ``weight`` and the bias, as far as they are ``wanted``.

    They can be differentiated.
    """
    for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight.to(x.dtype),
        [len(weight)] if bias else None,
        *(stride, padding, (1, 1), False, (0, 0), groups, list(wanted)),
    )
    return (
        for_x,
        None if for_weight is None else for_weight.to(weight.dtype),
        None if for_bias is None else for_bias.to(weight.dtype),
    )


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the padding (y, x) of ``conv``, which must be numbers, not a name."""
    assert not isinstance(conv.padding, str), "layers padded by name are not lowered"
    py, px = conv.padding
    return int(py), int(px)
