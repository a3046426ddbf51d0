"""A small federation for tests: shards of two classes, a network with batch norm, its clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import tiny_network
from torch import nn

from medspark.data.native import MappedSplit
from medspark.federate.client import Answer, Task, train_client
from medspark.federate.local import LocalConfig
from medspark.shards.manifest import read_manifest
from medspark.train.config import AdversarialConfig


def write(folder: Path, *, images: int = 24) -> Path:
    """Write images (N, 12, 12, 1) of two classes that differ in a bright square."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, images)
    pixels = draw.integers(50, 150, (images, 12, 12, 1))
    pixels[:, 4:8, 4:8] += 60 * labels[:, None, None, None]
    return array_shards.write_arrays(
        folder, {"train": (pixels.astype(np.uint8), labels)}, rows_per_group=5
    )


def rows_of(folder: Path, rows: Any = None) -> MappedSplit:
    split = MappedSplit(folder, read_manifest(folder), "train")
    return split if rows is None else split.subset(np.asarray(rows))


def network() -> nn.Module:
    return tiny_network.build_tiny().float()


def local(mode: Any = "standard", **settings: Any) -> LocalConfig:
    """Return a configuration: SGD at a constant rate without decay, but for ``settings``."""
    plain = {"optimiser": "sgd", "schedule": "constant", "weight_decay": 0.0, "lr": 0.1}
    return LocalConfig(
        **plain | {"batch_size": 8, "train": AdversarialConfig(mode=mode)} | settings
    )


def train(folder: Path, weights: Any, config: LocalConfig, **settings: Any) -> Answer:
    """Return the answer of a client that holds all rows, or ``rows``."""
    asked = {k: settings.pop(k) for k in ("round", "rounds", "seed", "control") if k in settings}
    rows = rows_of(folder, settings.pop("rows", None))
    return train_client(network(), rows, Task(weights, **asked), config, **settings)
