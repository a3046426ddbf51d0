"""Begin a federation: divide the training images among the clients, and make the first weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FederationFolder
from medspark.federate.network import new_network
from medspark.federate.partition import NO_SITES, Rows, clients_of, partition
from medspark.federate.weights import pack
from medspark.files import replacing
from medspark.shards.groups import Groups, read_groups
from medspark.shards.local import local_shards
from medspark.shards.manifest import Manifest

__all__ = ["MOST_GROUPS", "begin", "divide", "owners_of", "sites_of"]

# Groups of test patients that a report has a line for.
MOST_GROUPS = 50


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
    if not folder.finished() and not folder.has(-1, "weights"):
        folder.round(-1).mkdir(exist_ok=True)
        folder.write(-1, "weights", 0, pack(new_network(config, manifest), config.batch_norm))


def divide(config: FederationConfig, shards: Path, manifest: Manifest, split: str) -> list[Rows]:
    """Return the rows of ``split`` that each client holds, in the order of the clients."""
    labels = MappedSplit(shards, manifest, split).labels
    patients = _groups(shards, manifest, split, "patient_key")
    sites = sites_of(shards, manifest, split) if config.clients.by == "site" else patients
    return partition(
        config.clients, labels=labels, patients=patients, sites=sites, seed=config.seed
    )


def sites_of(shards: Path, manifest: Manifest, split: str) -> Groups:
    """Return the rows of ``split`` by site. Raises UsageError if no row has one."""
    sites = _groups(shards, manifest, split, "site")
    if sites.keys.to_pylist() in ([], [""]):
        raise UsageError(NO_SITES)
    return sites


def owners_of(
    config: FederationConfig, shards: Path, manifest: Manifest, split: str
) -> tuple[Rows | None, list[str]]:
    """Return the client (N,) that would hold each row of ``split``, and the clients' sites.

    With sites, a client is the site of that name in the training split; -1 is none of them. With
    dirichlet, images are drawn with the same shares of classes as in the training split; with
    fewer patients than clients, no image has an owner, and the result is None. By patient, no
    client has an image of ``split``, whose patients are others: they are divided as the training
    patients are, into as many groups, but at most ``MOST_GROUPS``.
    """
    if config.clients.by == "site":
        known = sites_of(shards, manifest, "train")
        return sites_of(shards, manifest, split).places_in(known), known.keys.to_pylist()
    if not manifest.splits[split].rows:
        return None, []
    if config.clients.by == "patient":
        trained = clients_of(config.clients, manifest.splits["train"])
        groups = min(trained, manifest.splits[split].patients, MOST_GROUPS)
        clients = config.clients.model_copy(update={"count": groups})
        config = config.model_copy(update={"clients": clients})
    try:
        rows = divide(config, shards, manifest, split)
    except UsageError:
        return None, []
    owners = np.empty(sum(len(part) for part in rows), dtype=np.int64)
    for client, part in enumerate(rows):
        owners[part] = client
    return owners, []


def _groups(
    shards: Path, manifest: Manifest, split: str, column: Literal["patient_key", "site"]
) -> Groups:
    place = local_shards(shards)
    return read_groups([place / shard.path for shard in manifest.splits[split].shards], column)
