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
from medspark.defend.detect.features import LOGITS, SMOOTHED, Features, Tap
from medspark.defend.detect.registry import COMPONENT_LAYERS

__all__ = ["Extractor", "smoothings"]

_BINOMIAL = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Extractor:
    """Features of images by layer, component layers included.

    Without component layers, the cost is one forward pass an image for any number of layers, and
    with ``smooths`` two more.
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
        # In an order of its own, and always with the logits, whatever layers are asked for besides.
        names = sorted(name for name in self.tap.layers if name != LOGITS)
        changes: list[Tensor] = []
        for smooth in smoothings(images):
            again = self.tap(smooth)
            changes += [features.layers[name] - again.layers[name] for name in names]
            changes.append(features.logits - again.logits)
        return Features(features.logits, {**features.layers, SMOOTHED: torch.cat(changes, dim=1)})


def smoothings(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``images`` (B, C, H, W) with the binomial mean, and the median, of 3 x 3 pixels each.

    Smoothing squeezes out what an attack adds between neighbours (feature squeezing, Xu et al.
    2018). Images are mirrored at their edges, and need two pixels a side.
    """
    wide = F.pad(images, (1, 1, 1, 1), mode="reflect").flatten(0, 1).unsqueeze(1)
    weights = images.new_tensor(_BINOMIAL)
    mean = F.conv2d(wide, torch.outer(weights, weights)[None, None])
    median = F.unfold(wide, 3).median(1).values
    return mean.view_as(images), median.view_as(images)
