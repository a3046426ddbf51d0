"""A network whose largest logit is the model's decision, so that attacks aim at its threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medspark.models.card import ModelCard

__all__ = ["Deciding", "deciding", "decision_shift"]


class Deciding(nn.Module):
    """The logits (B, K) of ``network``, lowered by ``shift`` (K,)."""

    shift: Tensor

    def __init__(self, network: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.gradients = bool(getattr(network, "gradients", True))
        self.network = network
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """Return the shifted logits (B, K) of images (B, C, H, W)."""
        logits: Tensor = self.network(images) - self.shift
        return logits


def decision_shift(card: ModelCard) -> float:
    """Return the raw log-odds of the positive class at the decision's threshold; 0 without one."""
    if card.decision is None:
        return 0.0
    return card.temperature * math.log(card.decision.threshold / (1 - card.decision.threshold))


def deciding(network: nn.Module, card: ModelCard) -> nn.Module:
    """Return ``network`` with the decision of its ``card`` in its logits; itself without one.

    An attack that stops where the likeliest class changes would stop too early, or too late, for
    any threshold but one half.
    """
    if card.positive is None:
        return network
    shift = torch.zeros(len(card.classes))
    shift[card.positive] = decision_shift(card)
    return Deciding(network, shift)
