"""The folded form of a network with frozen batch norm, which is trained, and the way back.

Frozen, a batch norm is a scale and a shift per channel. Moving them into the convolution's weight
and bias is the same network with the same freedom, without two passes over memory per layer.
What is trained is the folded form; what is kept and deployed is the network as timm defines it.
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

# Logits may differ by rounding alone.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Folded:
    """A network in the form that is trained, the same in the form that is kept, and what pairs up.

    ``pairs`` are the names of each convolution and of the batch norm that was folded into it.
    """

    trained: Classifier
    kept: Classifier
    pairs: Pairs

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

    The folded form is checked with ``images`` (B, C, H, W): where it would not give the same
    logits, the network itself is trained. ``model`` is rewritten, not changed: folded layers scale
    in the convolution.
    """
    if not model.batch_norm_frozen:
        return Folded(model, model, ())
    found = folded_copy(model, images, tolerance=_TOLERANCE)
    if found is None:
        _LOGGER.warning("batch norm cannot be folded into this network and is trained as it is")
        return Folded(model, model, ())
    trained, pairs = found
    if not pairs:
        return Folded(model, model, ())
    for _, norm_name in pairs:
        _scale_before(model.get_submodule(norm_name))
    return Folded(trained, model, pairs)


@torch.no_grad()
def _scale_before(norm: Any) -> None:
    """Rewrite the statistics of ``norm`` for a convolution that scales: its own scale becomes 1."""
    scale = scale_of(norm)
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale**2)
    norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
