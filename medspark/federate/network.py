"""Build the network of a federation, and save it as a model that every job can open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.stored import read_memory
from medspark.federate.weights import Weights, reestimate, unpack, unpack_kept
from medspark.models.checkpoint import describe, first_network, save_classifier
from medspark.models.classifier import Classifier
from medspark.models.config import model_folder
from medspark.seeding import derive
from medspark.shards.manifest import Manifest

__all__ = ["client_norms", "new_network", "save_network"]


def new_network(config: FederationConfig, manifest: Manifest) -> Classifier:
    """Return the network with its first weights, the same on every machine.

    A new head on given weights is zero: timm's random one gives MobileNet-V2 first logits of up to
    39, and federations that began with them died.
    """
    torch.manual_seed(derive(config.seed, "weights"))
    model = first_network(
        config.model,
        num_classes=len(manifest.classes),
        channels=manifest.channels,
        size=(manifest.height, manifest.width),
    )
    backbone: Any = model.backbone
    given = config.model.weights is not None and model_folder(config.model) is None
    if given and backbone.pretrained_cfg["num_classes"] != len(manifest.classes):
        for parameter in backbone.get_classifier().parameters():
            nn.init.zeros_(parameter)
    return model


def save_network(
    folder: Path,
    model: Classifier,
    weights: Weights,
    config: FederationConfig,
    manifest: Manifest,
    *,
    norms: Weights | None = None,
    images: Iterable[Tensor] = (),
) -> None:
    """Save ``model`` with the exchanged ``weights`` (d,) to ``folder``.

    ``norms`` are the batch norms under the policy local. Under the policy reestimate, statistics
    are those of ``images``, batches (B, C, H, W).
    """
    unpack(model, weights, config.batch_norm)
    if norms is not None:
        unpack_kept(model, norms, config.batch_norm)
    if config.batch_norm == "reestimate":
        reestimate(model, images)
    card = describe(
        model,
        classes=manifest.classes,
        multi_label=manifest.multi_label,
        height=manifest.height,
        width=manifest.width,
        bits=manifest.bits,
        dropout=config.model.dropout,
        rendering=manifest.source.get("rendering"),
    )
    save_classifier(folder, model, card)


def client_norms(folder: FederationFolder, last: Mapping[int, int]) -> Weights | None:
    """Return the mean of the batch norms that clients keep private under the policy local.

    ``last`` maps each client to the last round that counted it.
    """
    total, clients = np.zeros(()), 0
    for client, number in sorted(last.items()):
        norms = read_memory(folder.memory(client, number)).norms
        if norms is not None:
            total, clients = np.add(total, norms, dtype=np.float64), clients + 1
    return (total / clients).astype(np.float32) if clients else None
