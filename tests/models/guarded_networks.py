"""A small guarded network, for tests of several folders."""

from __future__ import annotations

import torch
from torch import nn

from medspark.models.backbones import build
from medspark.models.card import DenoiserShape
from medspark.models.config import ModelConfig
from medspark.models.guarded import GuardedClassifier, guard_classifier

SHAPE = DenoiserShape(grid=4, width=16, depth=2, heads=2, stem=4, embedding=8)


def build_guarded(
    *, side: int = 32, channels: int = 1, trained: bool = True, classes: int = 2
) -> GuardedClassifier:
    """Return a small network behind a small denoiser, in eval mode.

    A ``trained`` denoiser has random last weights, so that it changes images.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = build(ModelConfig(name="test_resnet"), num_classes=classes, channels=channels)
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm begins with zeros
        guarded = guard_classifier(plain.eval(), SHAPE, size=(side, side))
        if trained:
            nn.init.normal_(guarded.denoiser.head.weight, std=0.02)
    return guarded.eval()
