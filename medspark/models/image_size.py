"""Whether a network can take the images of a dataset, asked before anything starts."""

from __future__ import annotations

from medspark.models.config import USUAL, ModelConfig, timm_name
from medspark.shards.manifest import Manifest

__all__ = ["check_images"]

# From this side on, in pixels, the usual networks take images of any size.
_ANY_SIZE = 32


def check_images(config: ModelConfig, manifest: Manifest) -> None:
    """Raise UsageError if the network cannot take the images of a dataset."""
    if timm_name(config.name) in USUAL and min(manifest.height, manifest.width) >= _ANY_SIZE:
        return
    from medspark.models.backbones import check_size  # imports torch

    size = manifest.height, manifest.width
    check_size(config, channels=manifest.channels, size=size)
