"""Begin a federation: divide the training images among the clients, and make the first weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.network import new_network
from medspark.federate.partition import Rows, partition
from medspark.federate.weights import pack
from medspark.files import replacing
from medspark.shards.manifest import Manifest
from medspark.shards.schema import read_patients, read_sites

__all__ = ["begin", "divide", "owners_of", "sites_of"]


def begin(
    folder: FederationFolder, config: FederationConfig, shards: Path, manifest: Manifest
) -> None:
    """Write the clients' rows and the first weights to ``folder``, unless they are there.

    Raises UsageError if the images cannot be divided as ``config.clients`` says.
    """
    file = folder.path / "clients.npz"
    if not file.exists():
        rows = divide(config, shards, manifest, "train")
        starts = np.cumsum([0, *(len(part) for part in rows)])
        folder.path.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft, draft.open("wb") as stream:
            np.savez(stream, rows=np.concatenate(rows), starts=starts)
    if not folder.has(-1, "weights"):
        folder.round(-1).mkdir(exist_ok=True)
        folder.write(-1, "weights", 0, pack(new_network(config, manifest), config.batch_norm))


def divide(config: FederationConfig, shards: Path, manifest: Manifest, split: str) -> list[Rows]:
    """Return the rows of ``split`` that each client holds, in the order of the clients."""
    labels = MappedSplit(shards, manifest, split).labels
    patients = _column(shards, manifest, split, read_patients)
    sites = sites_of(shards, manifest, split) if config.clients.by == "site" else None
    return partition(
        config.clients, labels=labels, patients=patients, sites=sites, seed=config.seed
    )


def sites_of(shards: Path, manifest: Manifest, split: str) -> npt.NDArray[np.str_]:
    """Return the site of each row of ``split``. Raises UsageError if no row has one."""
    sites = _column(shards, manifest, split, read_sites)
    if not (sites != "").any():
        raise UsageError(
            "These shards name no sites: shard again with the site of each image, or choose "
            "clients.by patient or dirichlet."
        )
    return sites


def owners_of(
    config: FederationConfig, shards: Path, manifest: Manifest, split: str
) -> tuple[Rows | None, list[str]]:
    """Return the client (N,) that would hold each row of ``split``, and the clients' sites.

    With sites, a client is the site of that name in the training split; -1 is none of them. With
    dirichlet, images are drawn with the same shares of classes as in the training split. By
    patient, or with fewer patients than clients, no image has an owner: the result is None.
    """
    if config.clients.by == "site":
        known = np.unique(sites_of(shards, manifest, "train"))
        sites = sites_of(shards, manifest, split)
        places = np.clip(np.searchsorted(known, sites), 0, len(known) - 1)
        return np.where(known[places] == sites, places, -1), known.tolist()
    if config.clients.by == "patient" or not manifest.splits[split].rows:
        return None, []
    try:
        rows = divide(config, shards, manifest, split)
    except UsageError:
        return None, []
    owners = np.empty(sum(len(part) for part in rows), dtype=np.int64)
    for client, part in enumerate(rows):
        owners[part] = client
    return owners, []


def _column(shards: Path, manifest: Manifest, split: str, read: Any) -> npt.NDArray[np.str_]:
    columns = [read(shards / shard.path) for shard in manifest.splits[split].shards]
    return np.concatenate(columns) if columns else np.empty(0, dtype=np.str_)
