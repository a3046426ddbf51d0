"""What all workers of a federation are given, and the form of the steps that they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medspark.federate.client import Answer, train_client
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.network import new_network
from medspark.models.classifier import Classifier
from medspark.shards.manifest import Manifest, read_manifest

__all__ = ["Setting", "Step"]

# A step of a round in the form of JSON: its ``kind``, its round, and what each part has to do.
Step = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """All settings that a worker needs; it is pickled to the tasks."""

    config: FederationConfig
    shards: Path
    folder: FederationFolder
    train: Callable[..., Answer] = train_client

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the shards."""
        return read_manifest(self.shards)

    def network(self) -> Classifier:
        """Return the network with its first weights."""
        return new_network(self.config, self.manifest)
