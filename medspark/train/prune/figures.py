"""Count what is left of a pruned network, in its saved files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medspark.models.backbones import build
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.config import ModelConfig
from medspark.models.cost import multiply_adds
from medspark.models.masks import prunable, zero_share

__all__ = ["pruning_figures"]


def pruning_figures(folder: Path) -> dict[str, Any]:
    """Return ``sparsity``, ``multiply_adds`` and the share removed, of the model in ``folder``."""
    card, model = read_card(folder), load_classifier(folder)
    whole = build(
        ModelConfig(name=card.architecture), num_classes=len(card.classes), channels=card.channels
    )
    image = torch.zeros(1, card.channels, card.height, card.width)
    left = multiply_adds(model, image)
    return {
        "sparsity": zero_share(prunable(model)),
        "multiply_adds": left,
        "multiply_adds_removed": 1 - left / multiply_adds(whole, image),
    }
