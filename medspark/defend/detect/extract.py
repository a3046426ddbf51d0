"""Extract all features that detectors need: of one pass, and of passes of changed images.

Images change in two ways: some principal components are left out, or the image is smoothed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.defend.detect.change_point import (
    CENTRED,
    ChangePoint,
    change_point,
    soft_change_point,
)
from medspark.defend.detect.features import SMOOTHED, Features, Tap
from medspark.defend.detect.registry import COMPONENT_LAYERS

__all__ = ["Extractor", "smoothed"]

_BINOMIAL = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Extractor:
    """Features of images by layer, component layers included.

    Without component layers, the cost is one forward pass an image for any number of layers, and
    with ``smooths`` a second one.
    """

    tap: Tap
    components: tuple[str, ...]
    smooths: bool = False

    @classmethod
    def on(cls, model: nn.Module, layers: Sequence[str], head: str) -> Self:
        """Return the extractor of ``layers``, some of which may be conventions of (k, p)."""
        tapped = tuple(name for name in layers if name not in (SMOOTHED, *COMPONENT_LAYERS))
        components = tuple(name for name in layers if name in COMPONENT_LAYERS)
        return cls(Tap(model, tapped, head), components, SMOOTHED in layers)

    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``images`` (B, C, H, W)."""
        return self.with_points(images)[0]

    @torch.no_grad()
    def with_points(self, images: Tensor) -> tuple[Features, dict[str, ChangePoint]]:
        """Return the features of ``images``, and the change point by convention."""
        features = self._passes(images)
        points = {
            name: change_point(self.tap.model, images, features.logits, centred=name == CENTRED)
            for name in self.components
        }
        found = {name: point.features for name, point in points.items()}
        return Features(features.logits, {**features.layers, **found}), points

    def soft(self, images: Tensor, draw: int) -> Features:
        """Return differentiable features, for attacks: (k, p) are expectations."""
        features = self._passes(images)
        points = {
            name: soft_change_point(
                self.tap.model, images, features.logits, centred=name == CENTRED
            )
            for name in self.components
        }
        return Features(features.logits, {**features.layers, **points}, draw)

    def without_components(self) -> Extractor:
        """Return the extractor of all other layers."""
        return Extractor(self.tap, (), self.smooths)

    def _passes(self, images: Tensor) -> Features:
        features = self.tap(images)
        if not self.smooths:
            return features
        again = self.tap(smoothed(images)).layers
        change = torch.cat([was - again[name] for name, was in features.layers.items()], dim=1)
        return Features(features.logits, {**features.layers, SMOOTHED: change})


def smoothed(images: Tensor) -> Tensor:
    """Return ``images`` (B, C, H, W), each pixel a binomial mean of its 3 x 3 neighbourhood.

    Smoothing squeezes out what an attack adds between neighbours (feature squeezing, Xu et al.
    2018). Images are mirrored at their edges, and may have as few as two pixels a side.
    """
    weights = images.new_tensor(_BINOMIAL)
    channels = images.shape[1]
    kernel = torch.outer(weights, weights).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)
