"""A copy of a classifier that answers the same, faster: for evaluation, not for training."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from medspark.models.conv_norm import conv_norm_pairs

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
    pairs = conv_norm_pairs(model, images)
    for conv_name, norm_name in pairs:
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
        conv.weight, conv.bias = weight, bias
        # timm's BatchNormAct2d also applies dropout and the activation.
        model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    return len(pairs)


@torch.no_grad()
def _agree(plain: nn.Module, folded: nn.Module, images: Tensor) -> bool:
    expected, found = plain(images), folded(images)
    scale = float(expected.abs().max().clamp_min(1.0))
    return bool((expected - found).abs().max() <= _TOLERANCE * scale)
