"""Frozen batch norm folded into the convolutions before it, for training and back again.

Frozen, a batch norm is a scale and a shift per channel. Moving them into the convolution's weight
and bias is the same network with the same freedom, without two passes over memory per layer.
What is trained is the folded form; what is kept and deployed is the network as timm defines it.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.classifier import Classifier, evaluating
from medspark.models.conv_norm import conv_norm_pairs

__all__ = ["Folded", "fold"]

_LOGGER = logging.getLogger(__name__)

# Logits may differ by rounding alone.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Folded:
    """A network in the form that is trained, the same in the form that is kept, and what pairs up.

    ``pairs`` are the names of each convolution and of the batch norm that was folded into it.
    """

    trained: Classifier
    kept: Classifier
    pairs: tuple[tuple[str, str], ...]

    def norms(self) -> dict[str, Tensor]:
        """Return the tensors of the folded batch norms, which training does not touch."""
        return {
            f"{norm_name}.{name}": tensor
            for _, norm_name in self.pairs
            for name, tensor in self.kept.get_submodule(norm_name).state_dict().items()
        }

    @torch.no_grad()
    def unfold(self) -> Classifier:
        """Return ``kept`` with the weights that ``trained`` has by now."""
        if self.trained is self.kept:
            return self.kept
        state = self.trained.state_dict()
        for conv_name, norm_name in self.pairs:
            conv: Any = self.kept.get_submodule(conv_name)
            norm: Any = self.kept.get_submodule(norm_name)
            shift = state.pop(f"{conv_name}.bias") + norm.running_mean
            # A convolution of the kept form goes on adding the bias that it was made with.
            norm.bias.copy_(shift if conv.bias is None else shift - conv.bias)
        self.kept.load_state_dict(state, strict=False)
        return self.kept


def fold(model: Classifier, images: Tensor) -> Folded:
    """Return ``model``, whose batch norm is frozen, with a folded form of it to be trained.

    Which convolution feeds which batch norm is found by watching one pass of ``images``
    (B, C, H, W). Where the folded form would not give the same logits, the network itself is
    trained. ``model`` is rewritten, not changed: folded layers scale in the convolution.
    """
    pairs = conv_norm_pairs(model, images) if model.batch_norm_frozen else ()
    if not pairs:
        return Folded(model, model, ())
    with evaluating(model), torch.no_grad():
        expected = model(images)
    trained = copy.deepcopy(model)
    for conv_name, norm_name in pairs:
        _fold_pair(trained, conv_name, norm_name)
    with evaluating(trained), torch.no_grad():
        apart = float((trained(images) - expected).abs().max())
    if apart > _TOLERANCE * max(1.0, float(expected.abs().max())):
        _LOGGER.warning("batch norm cannot be folded into this network and is trained as it is")
        return Folded(model, model, ())
    for _, norm_name in pairs:
        _scale_before(model.get_submodule(norm_name))
    return Folded(trained, model, pairs)


@torch.no_grad()
def _fold_pair(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = model.get_submodule(conv_name)
    norm: Any = model.get_submodule(norm_name)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    before = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(norm.bias - before * scale)
    # timm's BatchNormAct2d applies the activation as well.
    activation = getattr(norm, "act", None) or nn.Identity()
    if isinstance(activation, nn.Hardtanh):
        # ReLU6 "in place" computes a copy and copies it back.
        activation.inplace = False
    model.set_submodule(norm_name, activation)


@torch.no_grad()
def _scale_before(norm: Any) -> None:
    """Rewrite the statistics of ``norm`` for a convolution that scales: its own scale becomes 1."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale**2)
    norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
