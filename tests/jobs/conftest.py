"""Fixture for tests of jobs: the folder of a small network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from job_calls import call, home

from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig

__all__ = ["call", "home", "network"]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """An untrained network of two classes for grey images of 32 x 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    card = describe(network, classes=("a", "b"), height=32, width=32)
    save_classifier(tmp_path / "network", network, card)
    return tmp_path / "network"
