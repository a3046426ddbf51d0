"""A faster copy of a classifier with the same logits, for evaluation only."""

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
    """Return a copy in eval mode, without parameter gradients, with batch norm folded if possible.

    The copy is checked on ``images`` (B, C, H, W): if folding changes the logits by more than
    1e-4, the copy is not folded. ``model`` is not changed.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    found = folded_copy(plain, images, tolerance=_TOLERANCE)
    if found is None:
        _LOGGER.info("batch norm cannot be folded into this network: evaluating it unfolded")
        return plain
    folded, _ = found
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
