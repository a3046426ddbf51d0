"""A copy of a classifier that answers the same, faster: for evaluation, not for training."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from medspark.models.classifier import BATCH_NORMS, evaluating

_LOGGER = logging.getLogger(__name__)

_TOLERANCE = 1e-4


def evaluation_copy(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy in eval mode without parameter gradients, batch norm folded where it can be.

    ``images`` (B, C, H, W) are a few that the copy is checked with: where it would not
    give the same logits, the copy is left unfolded. ``model`` is not changed.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    fold_batch_norm(folded, images)
    if _agree(plain, folded, images):
        return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    _LOGGER.info("batch norm cannot be folded into this network; it is evaluated as it is")
    return plain


def fold_batch_norm(model: nn.Module, images: Tensor) -> int:
    """Fold each batch norm of ``model`` into the convolution that feeds it, in place.

    Who feeds whom is found by watching one forward pass of ``images``. Returns how many were
    folded.
    """
    pairs = _convolutions_before_batch_norms(model, images)
    for conv, norm_name, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
        conv.weight, conv.bias = weight, bias
        # timm's BatchNormAct2d also applies dropout and the activation.
        model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    return len(pairs)


def _convolutions_before_batch_norms(
    model: nn.Module, images: Tensor
) -> list[tuple[nn.Conv2d, str, Any]]:
    made_by: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # an id is only unique while its object lives
    pairs: list[tuple[nn.Conv2d, str, Any]] = []

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made_by[id(output)] = module
        alive.append(output)

    def before_norm(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        conv = made_by.pop(id(inputs[0]), None)
        if conv is not None:
            pairs.append((conv, name, module))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif isinstance(module, BATCH_NORMS):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: before_norm(name, module, inputs)
                )
            )
    with evaluating(model), torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return pairs


@torch.no_grad()
def _agree(plain: nn.Module, folded: nn.Module, images: Tensor) -> bool:
    expected, found = plain(images), folded(images)
    scale = float(expected.abs().max().clamp_min(1.0))
    return bool((expected - found).abs().max() <= _TOLERANCE * scale)
