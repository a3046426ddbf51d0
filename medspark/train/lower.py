"""Convolutions over few positions, computed in ways that the CPU is faster at.

oneDNN's convolutions are made for large images. At 64 pixels the last stages of a network look at
2 x 2 or 4 x 4 positions through half a million weights and more, and there its weight gradient
takes up to eight times as long as the same sum written as a matrix product (measured, one thread,
batch 32: ResNet50's 1024 -> 2048 stride-2 layer 59.6 ms in bf16 forward and backward, 7.2 as a
product; its 512 -> 512 3 x 3 layer 48.4 and 10.5). For 1 x 1 layers the product pays from some 16
weights per position on (DenseNet121's 256 -> 128 over 8 x 8, two passes: 4.7 ms and 4.4).
Depthwise layers over 2 x 2 positions are as slow with padding of their own, and are given padded
images instead (MobileNet-V2's last: 7.9 ms and 1.2). Depthwise layers with a stride have no fast
bf16 kernel for the gradient of their input (MobileNet-V2's first: 54.8 ms, 1.6 in float32) and
stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.classifier import evaluating

__all__ = ["Float32Conv2d", "MatrixConv2d", "PaddedConv2d", "lower", "same_weights"]

# Weights per position from which the product is the faster one; a 3 x 3 layer has to copy its
# input nine times first.
_WORTH_POINTWISE, _WORTH_WINDOW = 16, 1000
# Positions up to which a depthwise layer is better off without padding of its own.
_WORTH_PADDING = 4

# What matrices hold while nobody changes the weights. The version that torch counts for a tensor
# does not tell: the fused AdamW leaves it as it is.
_CASTS: ContextVar[dict[tuple[nn.Module, torch.dtype], Tensor] | None] = ContextVar(
    "casts", default=None
)


@contextmanager
def same_weights(device: str) -> Iterator[None]:
    """Have each weight cast once for all passes within; none may change before it ends."""
    token = _CASTS.set({})
    try:
        # Autocast keeps its casts until the outermost one ends, though that one casts nothing.
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _CASTS.reset(token)


class MatrixConv2d(nn.Conv2d):
    """A convolution that multiplies its unfolded input by its weight; channels-last inside."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)  # the compiler has kernels of its own
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self._matrix(input.dtype), self.stride, _padding(self)
        )
        return product

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a matrix of ``dtype``."""
        casts = _CASTS.get()
        if casts is None:
            return self._cast(dtype)
        if (self, dtype) not in casts:
            casts[self, dtype] = self._cast(dtype)
        return casts[self, dtype]

    def _cast(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype).permute(0, 2, 3, 1).flatten(1)


class _Product(torch.autograd.Function):
    """The matrix product of a convolution, and its gradients.

    Written out because autograd would pay for what is only a view: a product that is returned as
    an image is one, and an activation in place on a view costs a copy and the memory layout of
    every gradient before it.
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
        rows, products = windows.reshape(-1, length), _rows(output)
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
            # Somebody will differentiate the gradient: torch's own knows how.
            return *_differentiable(ctx, x, weight, gradient, wanted), None, None, None
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


def _rows(image: Tensor) -> Tensor:
    """Return a channels-last ``image`` (B, C, H, W) as the matrix (B * H * W, C) that it is."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1])


def _windows(
    x: Tensor, kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return what each position looks at, (B, H', W', kh * kw * C), of ``x`` (B, H, W, C)."""
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
    """Add ``products`` (B, H', W', kh, kw, C) up where their windows lay, in ``shape``."""
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


def _differentiable(
    ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    found: list[Tensor | None] = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight.to(x.dtype),
        [len(weight)] if ctx.has_bias else None,
        *(ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, list(wanted)),
    )
    for_x, for_weight, for_bias = found
    return (
        for_x,
        None if for_weight is None else for_weight.to(weight.dtype),
        None if for_bias is None else for_bias.to(weight.dtype),
    )


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads its input first instead of while it convolves."""

    def forward(self, input: Tensor) -> Tensor:
        py, px = _padding(self)
        padded = F.pad(input, (px, px, py, py))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class Float32Conv2d(nn.Conv2d):
    """A convolution that stays in float32 where the passes around it are in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output = super().forward(input.to(self.weight.dtype))
        return output.to(input.dtype)


def lower(model: nn.Module, images: Tensor, *, batch_size: int) -> int:
    """Replace convolutions of ``model`` by equal ones that are faster here; say how many.

    The sizes are found by watching one pass of ``images`` (B, C, H, W); ``batch_size`` is how many
    images a pass will hold. Names and parameters stay as they are.
    """
    chosen: dict[str, type[nn.Conv2d]] = {}
    handles = []

    def watch(name: str, module: nn.Conv2d) -> None:
        def made(_: nn.Module, __: Any, output: Tensor) -> None:
            better = _better(module, positions=output.shape[2] * output.shape[3], batch=batch_size)
            if better is not None:
                chosen[name] = better

        handles.append(module.register_forward_hook(made))

    for name, module in model.named_modules():
        # Sub-classes, such as timm's with padding "same", compute something else.
        if type(module) is nn.Conv2d and _plain(module):
            watch(name, module)
    with evaluating(model), torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for name, better in chosen.items():
        model.set_submodule(name, _rebuilt(model.get_submodule(name), better))
    return len(chosen)


def _better(conv: nn.Conv2d, *, positions: int, batch: int) -> type[nn.Conv2d] | None:
    if conv.groups > 1:
        if conv.groups < conv.in_channels:
            return None
        if conv.stride != (1, 1):
            return Float32Conv2d
        few = positions <= _WORTH_PADDING and conv.padding != (0, 0)
        return PaddedConv2d if few else None
    limit = _WORTH_POINTWISE if conv.kernel_size == (1, 1) else _WORTH_WINDOW
    return MatrixConv2d if conv.weight.numel() >= limit * positions * batch else None


def _plain(conv: nn.Conv2d) -> bool:
    return (
        conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _rebuilt(conv: Any, better: type[nn.Conv2d]) -> nn.Conv2d:
    made = better(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str), "layers padded by name are not lowered"
    py, px = conv.padding
    return int(py), int(px)
