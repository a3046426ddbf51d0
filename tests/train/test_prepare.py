"""The network that is trained is the one that was asked for, whatever becomes of its batch norm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from medspark.models.classifier import batch_norms
from medspark.train.config import FitConfig
from medspark.train.prepare import make_network
from medspark.train.world import World


def test_synchronised_batch_norm_changes_no_answer():
    source: Any = SimpleNamespace(manifest=SimpleNamespace(classes=("a", "b"), channels=1))
    world = World(0, 0, 2, torch.device("cuda", 0))  # the network is moved there later
    plain, synchronised = (
        make_network(
            FitConfig.model_validate(
                {
                    "shards": Path("unused"),
                    "model": {"name": "test_efficientnet"},
                    "train": {"mode": "standard", "sync_batch_norm": synchronise},
                }
            ),
            source,
            world,
        ).eval()
        for synchronise in (False, True)
    )
    images = torch.rand(3, 1, 32, 32)

    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(synchronised))
    assert torch.equal(synchronised(images), plain(images))
