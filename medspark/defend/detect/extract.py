"""Extract all features that detectors need: of one pass, and of passes with fewer components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from medspark.defend.detect.change_point import (
    CENTRED,
    ChangePoint,
    change_point,
    soft_change_point,
)
from medspark.defend.detect.features import Features, Tap
from medspark.defend.detect.registry import COMPONENT_LAYERS

__all__ = ["Extractor"]


@dataclass(frozen=True)
class Extractor:
    """Features of images by layer, component layers included.

    Without component layers, the cost is one forward pass an image for any number of layers.
    """

    tap: Tap
    components: tuple[str, ...]

    @classmethod
    def on(cls, model: nn.Module, layers: Sequence[str], head: str) -> Self:
        """Return the extractor of ``layers``, some of which may be conventions of (k, p)."""
        tapped = tuple(name for name in layers if name not in COMPONENT_LAYERS)
        components = tuple(name for name in layers if name in COMPONENT_LAYERS)
        return cls(Tap(model, tapped, head), components)

    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``images`` (B, C, H, W)."""
        return self.with_points(images)[0]

    @torch.no_grad()
    def with_points(self, images: Tensor) -> tuple[Features, dict[str, ChangePoint]]:
        """Return the features of ``images``, and the change point by convention."""
        features = self.tap(images)
        points = {
            name: change_point(self.tap.model, images, features.logits, centred=name == CENTRED)
            for name in self.components
        }
        found = {name: point.features for name, point in points.items()}
        return Features(features.logits, {**features.layers, **found}), points

    def soft(self, images: Tensor, draw: int) -> Features:
        """Return differentiable features, for attacks: (k, p) are expectations."""
        features = self.tap(images)
        points = {
            name: soft_change_point(
                self.tap.model, images, features.logits, centred=name == CENTRED
            )
            for name in self.components
        }
        return Features(features.logits, {**features.layers, **points}, draw)

    def without_components(self) -> Extractor:
        """Return the extractor of the layers that one pass gives."""
        return Extractor(self.tap, ())
