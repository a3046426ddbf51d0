"""Fold frozen batch norm into convolutions for training, and unfold it afterwards.

A frozen batch norm is a scale and a shift per channel. Moved into the convolution's weight and
bias, they give the same network with the same trainable functions, without two passes over memory
per layer. The folded form is trained; the network as timm defines it is saved and deployed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medspark.models.classifier import Classifier
from medspark.models.kernels.fold_norm import Pairs, folded_copy, scale_of

__all__ = ["Folded", "fold"]

_LOGGER = logging.getLogger(__name__)

# Logits may differ by rounding only.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Folded:
    """A network in the form to train and in the form to save.

    ``pairs`` holds the names of each convolution and of the batch norm folded into it.
    """

    trained: Classifier
    kept: Classifier
    pairs: Pairs

    def norms(self) -> dict[str, Tensor]:
        """Return the tensors of the folded batch norms, which training does not change."""
        return {
            f"{norm_name}.{name}": tensor
            for _, norm_name in self.pairs
            for name, tensor in self.kept.get_submodule(norm_name).state_dict().items()
        }

    @torch.no_grad()
    def unfold(self) -> Classifier:
        """Return ``kept`` with the current weights of ``trained``."""
        if self.trained is self.kept:
            return self.kept
        state = self.trained.state_dict()
        for conv_name, norm_name in self.pairs:
            conv: Any = self.kept.get_submodule(conv_name)
            norm: Any = self.kept.get_submodule(norm_name)
            shift = state.pop(f"{conv_name}.bias") + norm.running_mean
            # The convolution of the kept form still adds its original bias.
            norm.bias.copy_(shift if conv.bias is None else shift - conv.bias)
        self.kept.load_state_dict(state, strict=False)
        return self.kept


def fold(model: Classifier, images: Tensor) -> Folded:
    """Return ``model``, whose batch norm is frozen, with its folded form for training.

    The folded form is checked on ``images`` (B, C, H, W); if its logits differ, ``model`` itself
    is trained. ``model`` is rewritten in place to an equal network, in which the folded batch norms
    have scale 1 and the convolutions scale instead.
    """
    if not model.batch_norm_frozen:
        return Folded(model, model, ())
    found = folded_copy(model, images, tolerance=_TOLERANCE)
    if found is None:
        _LOGGER.warning("batch norm cannot be folded into this network: training it unfolded")
        return Folded(model, model, ())
    trained, pairs = found
    if not pairs:
        return Folded(model, model, ())
    for _, norm_name in pairs:
        _scale_before(model.get_submodule(norm_name))
    return Folded(trained, model, pairs)


@torch.no_grad()
def _scale_before(norm: Any) -> None:
    """Rewrite ``norm`` to a scale of 1, for inputs that the convolution has already scaled."""
    scale = scale_of(norm)
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale**2)
    norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
