"""Evaluate the network of a federation, and under the policy local the network of each client.

The images are divided into pieces, each stored as a file, so any worker can do any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from medspark.evaluate.config import AttackSettings
from medspark.evaluate.pieces import Job, SplitPieces
from medspark.evaluate.robust import Batch, attack_all
from medspark.evaluate.summary import Array, Arrays
from medspark.federate.folder import FederationFolder
from medspark.federate.stored import read_memory
from medspark.federate.weights import Weights, pack_kept, unpack_kept
from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.deciding import deciding

__all__ = ["OwnNetwork", "evaluation", "own_networks"]


def evaluation(shards: Path, document: Mapping[str, Any]) -> Job:
    """Return the evaluation that a step of kind evaluate describes."""
    return Job(
        model=Path(document["model"]),
        surrogates=(),
        shards=shards,
        split=document["split"],
        config=AttackSettings.model_validate(document["config"]),
        total=int(document["total"]),
        piece=int(document["piece"]),
        work=Path(document["work"]),
    )


@dataclass(frozen=True)
class OwnNetwork(SplitPieces):
    """The images ``own`` (N,) of one client, attacked in the network with its own batch norms."""

    shards: Path
    split: str
    piece: int
    work: Path
    own: Array
    config: AttackSettings
    probed_below: int
    network: Callable[[], nn.Module]

    @property
    def rows(self) -> Array:
        """The sorted rows of the images."""
        return self.own

    @property
    def batch_size(self) -> int:
        """The number of images per batch."""
        return self.config.batch_size

    def piece_arrays(self, batches: Iterator[Batch]) -> Arrays:
        """Return the arrays of the client's images under attack."""
        return attack_all(self.network(), batches, self.config, probed_below=self.probed_below)


def own_networks(
    folder: FederationFolder, whole: Job, clients: Mapping[str, Any]
) -> Iterator[OwnNetwork]:
    """Yield the test of each of ``clients``, one piece: its rows, and the last round it counted in.

    A client that no round counted has no batch norms of its own, and is tested with those of the
    whole network. All share one network, so a test has to end before the next one begins.
    """
    network, card = load_classifier(whole.model), read_card(whole.model)
    usual = pack_kept(network, "local")
    for client, (rows, last) in clients.items():
        known = None if last is None else read_memory(folder.memory(int(client), last)).norms
        norms = usual if known is None else known

        def own(norms: Weights = norms) -> nn.Module:
            unpack_kept(network, norms, "local")
            return deciding(network, card)

        yield OwnNetwork(
            shards=whole.shards,
            split=whole.split,
            piece=len(rows),
            work=whole.work / f"client-{int(client):06d}",
            own=np.array(rows),
            config=whole.config,
            # Sanity checks probe the same images as in the test of the whole network.
            probed_below=whole.config.probed_below(whole.rows),
            network=own,
        )
