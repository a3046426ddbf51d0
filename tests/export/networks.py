"""What tests of exports share: small networks, and images that differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.shards.schema import SPLITS

SIDE = 32
CLASSES = ("a", "b")


def network(seed: int = 0, *, name: str = "test_resnet") -> Classifier:
    """Return a network of random weights for grey images of 32 x 32, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(ModelConfig(name=name), num_classes=len(CLASSES), channels=1).eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Return images (N, 1, 32, 32) of blobs, each another one, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear").clamp(0, 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a network, whose answers differ from image to image."""
    made = network()
    card = describe(made, classes=CLASSES, height=SIDE, width=SIDE)
    save_classifier(tmp_path / "model", made, card)
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of 24 images in every split, which differ."""
    from array_shards import write_arrays

    pixels = (255 * images(24)).numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    splits = dict.fromkeys(SPLITS, (pixels, np.arange(24) % 2))
    return write_arrays(tmp_path / "shards", splits, shards=2, rows_per_group=8)
