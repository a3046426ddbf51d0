"""Noisy images in which one half or the other is brighter, and a network that has learnt that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from array_shards import write_arrays
from torch.nn.functional import cross_entropy

from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.seeding import uniform

SIDE, ROWS = 16, {"train": 160, "val": 80, "test": 24}


def pictures(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, H, W, 1) of a split, and their labels."""
    count = ROWS[split]
    drawn = uniform(len(split), np.arange(count * SIDE * SIDE)).reshape(count, SIDE, SIDE, 1)
    labels = np.arange(count) % 2
    images = 80 + 60 * drawn
    images[labels == 1, : SIDE // 2] += 12
    images[labels == 0, SIDE // 2 :] += 12
    return images.astype(np.uint8), labels


def write_halves(folder: Path) -> Path:
    """Write the shards of all splits; test images come from two sites."""
    sites = {"test": ["north"] * 12 + ["south"] * 12}
    return write_arrays(folder, {split: pictures(split) for split in ROWS}, sites=sites)


def save_network(folder: Path) -> Path:
    """Save a network that has learnt the task a little."""
    images, labels = pictures("train")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for rows in torch.arange(160).repeat(10).split(32):
            optimiser.zero_grad()
            cross_entropy(network(pixels[rows]), torch.from_numpy(labels)[rows]).backward()
            optimiser.step()
    card = describe(network, classes=("a", "b"), height=SIDE, width=SIDE)
    save_classifier(folder, network, card)
    return folder
