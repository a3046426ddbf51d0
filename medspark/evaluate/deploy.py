"""A copy of a classifier that answers the same, faster: for evaluation, not for training."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from medspark.models.kernels.fold_norm import folded_copy

__all__ = ["evaluation_copy"]

_LOGGER = logging.getLogger(__name__)

_TOLERANCE = 1e-4


def evaluation_copy(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy in eval mode without parameter gradients, batch norm folded where it can be.

    ``images`` (B, C, H, W) are a few that the copy is checked with: where it would not
    give the same logits, the copy is left unfolded. ``model`` is not changed.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    found = folded_copy(plain, images, tolerance=_TOLERANCE)
    if found is None:
        _LOGGER.info("batch norm cannot be folded into this network; it is evaluated as it is")
        return plain
    folded, _ = found
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
