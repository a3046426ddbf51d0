"""Replace convolutions and dense blocks by equal layers that are faster on the CPU.

All times are for one thread, batch 32, bf16, forward and backward, on a processor with AMX; see
``processor`` for the sizes from which on a layer is replaced.

oneDNN's convolutions are optimised for large images. At 64 pixels the last stages of a network have
2 x 2 or 4 x 4 positions and half a million weights or more. There oneDNN's weight gradient takes up
to eight times as long as a matrix product: ResNet50's 1024 -> 2048 stride-2 layer takes 59.6 ms, as
a product 7.2; its 512 -> 512 3 x 3 layer 48.4 and 10.5. For 1 x 1 layers the product is faster from
about 16 weights per position (DenseNet121's 256 -> 128 over 8 x 8, two passes: 4.7 ms and 4.4).
Depthwise layers over 2 x 2 positions are slow if they pad themselves, and get padded images instead
(MobileNet-V2's last: 7.9 ms and 1.2). Depthwise layers with a stride have no fast bf16 kernel for
the gradient of their input (MobileNet-V2's first: 54.8 ms, 1.6 in float32) and stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.classifier import evaluating
from medspark.models.kernels.dense_block import BufferedDenseBlock, can_be_buffered
from medspark.models.kernels.matrix_conv import MatrixConv2d, padding_of
from medspark.models.kernels.processor import thresholds
from medspark.models.kernels.wide_depthwise import WideDepthwiseConv2d, gains

__all__ = ["Float32Conv2d", "PaddedConv2d", "lower"]


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads its input in a separate step."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` (B, C, H, W)."""
        py, px = padding_of(self)
        padded = F.pad(input, (px, px, py, py))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 within bf16 passes."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` (B, C, H, W), in the type of ``input``."""
        with torch.autocast(input.device.type, enabled=False):
            output = super().forward(input.to(self.weight.dtype))
        return output.to(input.dtype)


def lower(model: nn.Module, images: Tensor, *, batch_size: int) -> int:
    """Replace layers of ``model`` by equal, faster ones; return how many were replaced.

    One pass of ``images`` (B, C, H, W) measures the layers' sizes. ``batch_size`` is the number of
    images per training pass. Names and parameters do not change.
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
        # Subclasses, for example timm's convolution with padding "same", compute something else.
        if type(module) is nn.Conv2d and _plain(module):
            watch(name, module)
    with evaluating(model), torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    blocks = [name for name, module in model.named_modules() if can_be_buffered(module)]
    for name in blocks:
        model.set_submodule(name, BufferedDenseBlock(model.get_submodule(name)))
    for name, better in chosen.items():
        model.set_submodule(name, _rebuilt(model.get_submodule(name), better))
    return len(chosen) + len(blocks)


def _better(conv: nn.Conv2d, *, positions: int, batch: int) -> type[nn.Conv2d] | None:
    if conv.groups > 1:
        if conv.groups < conv.in_channels:
            return None
        if conv.stride != (1, 1):
            return Float32Conv2d
        if gains(conv, positions=positions):
            return WideDepthwiseConv2d
        few = positions <= thresholds().padding and conv.padding != (0, 0)
        return PaddedConv2d if few else None
    limit = thresholds().pointwise if conv.kernel_size == (1, 1) else thresholds().window
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
