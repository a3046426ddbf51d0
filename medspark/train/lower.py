"""Convolutions with few positions and many weights, computed as one matrix product on the CPU.

oneDNN's convolutions are made for large images. At 64 pixels the last stages of a network look at
2 x 2 or 4 x 4 positions through half a million weights and more, and there its weight gradient
takes up to eight times as long as the same sum written as a matrix product (measured, one thread,
batch 32: ResNet50's 1024 -> 2048 stride-2 layer 59.6 ms in bf16 forward and backward, 7.2 as a
product; its 512 -> 512 3 x 3 layer 48.4 and 10.5).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.classifier import evaluating

__all__ = ["MatrixConv2d", "lower"]

# Weights per position from which the product is the faster one; a 3 x 3 layer has to copy its
# input nine times first.
_WORTH_POINTWISE, _WORTH_WINDOW = 100, 1000


class MatrixConv2d(nn.Conv2d):
    """A convolution that multiplies its unfolded input by its weight; channels-last inside."""

    def forward(self, input: Tensor) -> Tensor:
        windows = self._windows(input.permute(0, 2, 3, 1))
        batch, height, width, length = windows.shape
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, length)
        product = F.linear(windows.reshape(-1, length), weight, self.bias)
        return product.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        """Return what each position looks at, (B, H', W', kh * kw * C), of ``x`` (B, H, W, C)."""
        (kh, kw), (sy, sx) = self.kernel_size, self.stride
        py, px = _padding(self)
        if py or px:
            x = F.pad(x, (0, 0, px, px, py, py))
        height, width = (x.shape[1] - kh) // sy + 1, (x.shape[2] - kw) // sx + 1
        seen = [
            x[:, i : i + sy * (height - 1) + 1 : sy, j : j + sx * (width - 1) + 1 : sx]
            for i in range(kh)
            for j in range(kw)
        ]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=-1)


def lower(model: nn.Module, images: Tensor, *, batch_size: int) -> int:
    """Replace convolutions of ``model`` by matrix products where that is faster; say how many.

    The sizes are found by watching one pass of ``images`` (B, C, H, W); ``batch_size`` is how many
    images a pass will hold. Names and parameters stay as they are.
    """
    chosen: list[str] = []
    handles = []

    def watch(name: str, module: nn.Conv2d) -> None:
        def made(_: nn.Module, __: Any, output: Tensor) -> None:
            positions = batch_size * output.shape[2] * output.shape[3]
            if _worth(module, positions):
                chosen.append(name)

        handles.append(module.register_forward_hook(made))

    for name, module in model.named_modules():
        # Sub-classes, such as timm's with padding "same", compute something else.
        if type(module) is nn.Conv2d and module.groups == 1 and _plain(module):
            watch(name, module)
    with evaluating(model), torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for name in chosen:
        model.set_submodule(name, _as_matrix(model.get_submodule(name)))
    return len(chosen)


def _worth(conv: nn.Conv2d, positions: int) -> bool:
    pointwise = conv.kernel_size == (1, 1)
    return conv.weight.numel() >= positions * (_WORTH_POINTWISE if pointwise else _WORTH_WINDOW)


def _plain(conv: nn.Conv2d) -> bool:
    return (
        conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _as_matrix(conv: Any) -> MatrixConv2d:
    made = MatrixConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        bias=conv.bias is not None,
        device="meta",
    )
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str), "layers padded by name are not lowered"
    py, px = conv.padding
    return int(py), int(px)
