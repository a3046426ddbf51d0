"""DenseNet's blocks with one buffer for all layers and explicit gradients.

A dense layer reads the outputs of all layers before it. timm concatenates them again for each
layer, and autograd splits the gradient of every copy and adds the pieces one by one. Here the
layers of a block write into one buffer, and their gradients accumulate in another. Frozen batch
norm (a scale and a shift) and ReLU between the convolutions also bypass autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.kernels.bit_relu import block_, relu_
from medspark.models.kernels.casts import as_autocast, cast_once
from medspark.models.kernels.matrix_conv import as_matrix, rows_of
from medspark.models.kernels.narrow_conv import narrow_backward

__all__ = ["BufferedDenseBlock", "can_be_buffered"]

# The number of parameters of a layer.
_EACH = 5


def can_be_buffered(module: nn.Module) -> bool:
    """Return whether ``module`` is a timm dense block whose second batch norms are folded.

    All its layers have to add as many channels, which they do not after structured pruning.
    """
    layers: list[Any]
    kind, layers = type(module), list(module.children())
    if (kind.__module__, kind.__name__) != ("timm.models.densenet", "DenseBlock"):
        return False
    return len({layer.conv2.out_channels for layer in layers}) == 1 and all(
        isinstance(layer.norm1, nn.BatchNorm2d)
        and type(layer.norm1.act) is nn.ReLU
        and type(layer.norm1.drop) is nn.Identity
        and layer.conv1.bias is not None
        and type(layer.norm2) is nn.ReLU
        and type(layer.conv2) is nn.Conv2d
        and layer.drop_rate == 0
        and not layer.grad_checkpointing
        for layer in layers
    )


class BufferedDenseBlock(nn.ModuleDict):
    """A dense block with the layers, names and parameters of ``block``."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (B, C + layers * growth, H, W) of ``x`` (B, C, H, W)."""
        layers: list[Any] = list(self.values())
        moving = any(layer.norm1.training for layer in layers)
        if moving or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _plain(x, layers)
        output: Tensor = _Block.apply(  # type: ignore[no-untyped-call]
            as_autocast(x), layers, *_parameters(layers)
        )
        return output


class _Block(torch.autograd.Function):
    """All layers of a block as one function that saves the tensors for its gradients."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, layers: Sequence[Any], *_: Tensor
    ) -> Tensor:
        first, growth = x.shape[1], layers[0].conv2.out_channels
        output = _empty(x, first + growth * len(layers))
        output[:, :first] = x
        kept: list[Tensor] = []
        for number, layer in enumerate(layers):
            end = first + growth * number
            # Batch norm is ten times slower on a slice of a buffer.
            seen = output[:, :end].contiguous(memory_format=torch.channels_last)
            active, wide, made = _forward(layer, seen)
            output[:, end : end + growth] = made
            kept += [seen, active, wide]
        ctx.save_for_backward(x, *kept)
        ctx.layers = layers
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient itself will be differentiated: use autograd.
            return _differentiable(x, ctx.layers, gradient)
        total = gradient.clone(memory_format=torch.channels_last)
        found: list[Tensor | None] = []
        for number in reversed(range(len(ctx.layers))):
            seen, active, wide = kept[3 * number : 3 * number + 3]
            wanted = any(ctx.needs_input_grad[2 + _EACH * number :][:_EACH])
            found[:0] = _backward(ctx.layers[number], total, seen, active, wide, wanted=wanted)
        for_x = total[:, : x.shape[1]].contiguous(memory_format=torch.channels_last)
        return for_x, None, *found


def _forward(layer: Any, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of the first ReLU, of the second ReLU, and of the layer."""
    norm, conv1, conv2 = layer.norm1, layer.conv1, layer.conv2
    active = relu_(
        F.batch_norm(
            seen, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    )
    wide = _empty(seen, conv1.out_channels)
    matrix = cast_once(conv1.weight, seen.dtype, as_matrix)
    torch.addmm(conv1.bias.to(seen.dtype), rows_of(active), matrix.t(), out=rows_of(wide))
    made = F.conv2d(relu_(wide), cast_once(conv2.weight, seen.dtype), padding=1)
    return active, wide, made


def _backward(
    layer: Any, total: Tensor, seen: Tensor, active: Tensor, wide: Tensor, *, wanted: bool
) -> Sequence[Tensor | None]:
    """Return the gradients of ``_parameters`` if ``wanted``; add that of ``seen`` to ``total``."""
    norm, conv1, conv2 = layer.norm1, layer.conv1, layer.conv2
    end = seen.shape[1]
    for_made = total[:, end : end + conv2.out_channels]
    for_wide, for_conv2 = narrow_backward(for_made, wide, conv2.weight, wanted=wanted)
    rows = rows_of(block_(for_wide, wide))
    for_active = torch.empty_like(active)
    torch.mm(rows, cast_once(conv1.weight, seen.dtype, as_matrix), out=rows_of(for_active))
    block_(for_active, active)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    total[:, :end].addcmul_(for_active, scale.to(seen.dtype).view(-1, 1, 1))
    if not wanted:
        return _EACH * (None,)
    _, for_scale, for_shift = torch.ops.aten.native_batch_norm_backward(
        *(for_active, seen, norm.weight, norm.running_mean, norm.running_var, None, None, False),
        *(norm.eps, (False, True, True)),
    )
    for_conv1 = torch.mm(rows.t(), rows_of(active)).view(conv1.weight.shape)
    kind = conv1.weight.dtype
    return for_scale, for_shift, for_conv1.to(kind), rows.sum(0).to(kind), for_conv2


def _differentiable(
    x: Tensor, layers: Sequence[Any], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    low = x.dtype == torch.bfloat16
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
        output = _plain(x, layers)
    inputs = [x, *_parameters(layers)]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
    for_x, *others = (next(found) if tensor.requires_grad else None for tensor in inputs)
    return for_x, None, *others


def _plain(x: Tensor, layers: Sequence[Any]) -> Tensor:
    """Compute the block as timm does."""
    features = [x]
    for layer in layers:
        features.append(layer(features))
    return torch.cat(features, 1)


def _parameters(layers: Sequence[Any]) -> list[nn.Parameter]:
    return [
        parameter
        for layer in layers
        for parameter in (
            *(layer.norm1.weight, layer.norm1.bias),
            *(layer.conv1.weight, layer.conv1.bias, layer.conv2.weight),
        )
    ]


def _empty(like: Tensor, channels: int) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, *like.shape[2:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
