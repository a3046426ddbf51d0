"""The network that is trained is the one that was asked for, whatever becomes of its batch norm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medspark.errors import UsageError
from medspark.models.classifier import Classifier, batch_norms
from medspark.train.config import FitConfig
from medspark.train.prepare import make_network
from medspark.train.world import World


def network(synchronise: bool, *, rows: int = 50, ranks: int = 2) -> Classifier:
    """Return the network that is trained on so many images, in batches of at most 4."""
    manifest = SimpleNamespace(classes=("a", "b"), channels=1)
    source: Any = SimpleNamespace(manifest=manifest, split=lambda _: range(rows))
    train = {"mode": "standard", "sync_batch_norm": synchronise, "batch_size": 4}
    config = FitConfig.model_validate(
        {"shards": Path("unused"), "model": {"name": "test_efficientnet"}, "train": train}
    )
    # The network is moved there later.
    return make_network(config, source, World(0, 0, ranks, torch.device("cuda", 0)))


def test_synchronised_batch_norm_changes_no_answer():
    plain, synchronised = (network(synchronise).eval() for synchronise in (False, True))
    images = torch.rand(3, 1, 32, 32)

    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(synchronised))
    assert torch.equal(synchronised(images), plain(images))


def test_batch_norm_is_not_synchronised_with_a_process_that_has_no_image():
    assert network(True, rows=48, ranks=4)

    with pytest.raises(UsageError, match=r"each of the 4 processes .* some steps have 3"):
        network(True, rows=47, ranks=4)
