"""Divide images among simulated clients: a pure function of labels, patients, sites and a seed.

Every image belongs to one client. All images of a patient belong to the same client, so that no
patient is at two simulated hospitals. Only ``site`` follows the archive: a patient with images from
two sites is at both clients.
"""

from __future__ import annotations

import heapq
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from medspark.config import Config
from medspark.errors import UsageError
from medspark.seeding import derive
from medspark.shards.groups import Groups
from medspark.shards.manifest import Split

__all__ = ["NO_SITES", "ClientsConfig", "Rows", "clients_of", "partition"]

Rows = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Labels = npt.NDArray[Any]

NO_SITES = (
    "These shards name no sites: shard again with the site of each image, or choose clients.by "
    "patient or dirichlet."
)


class ClientsConfig(Config):
    """The clients of a federation, and how images are divided among them."""

    by: Literal["site", "patient", "dirichlet"] = Field(
        "patient",
        description="site: one client for each site of the archive; patient: equal shares of "
        "patients; dirichlet: skewed labels",
    )
    count: int | None = Field(
        None, ge=1, description="number of clients; default: one for each site or patient"
    )
    alpha: float = Field(
        0.5, gt=0, description="parameter of dirichlet; smaller values skew the labels more"
    )

    @model_validator(mode="after")
    def _fits(self) -> ClientsConfig:
        if self.by == "dirichlet" and self.count is None:
            raise ValueError("clients.by dirichlet needs clients.count")
        if self.by == "site" and self.count is not None:
            raise ValueError("clients.by site takes no clients.count: every site is one client")
        return self


def partition(
    config: ClientsConfig, *, labels: Labels, patients: Groups, sites: Groups, seed: int
) -> list[Rows]:
    """Return the sorted rows of each client; every row belongs to exactly one client.

    ``labels`` are classes (N,) or findings (N, K) as 0 and 1. Only ``site`` looks at ``sites``.
    Raises UsageError if there are fewer patients than clients.
    """
    if config.by == "site":
        return _rows(sites.codes, len(sites.keys))
    patient, count = patients.codes, _count(config, len(patients.keys))
    drawn = (derive(seed, "client", key.as_py()) for key in patients.keys)
    queue = np.argsort(np.fromiter(drawn, np.uint64, len(patients.keys)))
    if config.by == "patient":
        owners = _even(queue, np.bincount(patient), count)
    else:
        owners = _skewed(queue, _classes(labels, patient), count, config.alpha, seed)
    return _rows(owners[patient], count)


def clients_of(config: ClientsConfig, split: Split) -> int:
    """Return how many clients ``partition`` divides the images of ``split`` among.

    Raises UsageError as ``partition`` does.
    """
    if config.by != "site":
        return _count(config, split.patients)
    if not split.sites:
        raise UsageError(NO_SITES)
    # Images without a site are together at one client.
    return len(split.sites) + int(sum(split.sites.values()) < split.rows)


def _count(config: ClientsConfig, patients: int) -> int:
    count = patients if config.count is None else config.count
    if count > patients:
        raise UsageError(
            f"clients.count {count} is more than the {patients} patients; a patient belongs to "
            "one client."
        )
    return count


def _rows(owner: Rows | Codes, count: int) -> list[Rows]:
    # A stable sort keeps the rows of each client in order, at the cost of one pass for all.
    rows = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
    bounds = np.cumsum(np.bincount(owner, minlength=count))[:-1]
    return np.split(rows, bounds)


def _even(queue: Rows, images: Rows, count: int) -> Rows:
    """Return the client of each patient: in turn, each goes to the client with the fewest images.

    Ties go to the client with the fewest patients, so that every client gets a patient.
    """
    owners = np.empty(len(queue), dtype=np.int64)
    held = [(0, 0, client) for client in range(count)]
    for patient in queue:
        pictures, patients, client = held[0]
        owners[patient] = client
        heapq.heapreplace(held, (pictures + int(images[patient]), patients + 1, client))
    return owners


def _classes(labels: Labels, patient: Codes) -> Rows:
    """Return the most common class (P,) of each patient's images; ties go to the smallest class.

    Every combination of findings counts as one class.
    """
    if labels.ndim == 2:
        _, labels = np.unique(labels, axis=0, return_inverse=True)
    _, kind = np.unique(labels.ravel(), return_inverse=True)
    counts = np.zeros((int(patient.max()) + 1, int(kind.max()) + 1), dtype=np.int64)
    np.add.at(counts, (patient, kind), 1)
    usual: Rows = counts.argmax(axis=1)
    return usual


def _skewed(queue: Rows, classes: Rows, count: int, alpha: float, seed: int) -> Rows:
    """Return the client of each patient; the clients' shares of each class are Dirichlet(alpha).

    This is the common form of Hsu, Qi and Brown 2019. A client without a patient gets one from the
    largest client.
    """
    owners = np.empty(len(queue), dtype=np.int64)
    for kind in np.unique(classes):
        members = queue[classes[queue] == kind]
        draw = np.random.default_rng(derive(seed, "dirichlet", int(kind)))
        shares = _dirichlet(draw, alpha, count)
        bounds = np.floor(np.cumsum(shares) * len(members) + 0.5).astype(np.int64)[:-1]
        for client, part in enumerate(np.split(members, bounds)):
            owners[part] = client
    held = np.bincount(owners, minlength=count)
    for client in np.flatnonzero(held == 0):
        largest = int(held.argmax())
        owners[queue[owners[queue] == largest][0]] = client
        held[[largest, client]] += -1, 1
    return owners


def _dirichlet(draw: np.random.Generator, alpha: float, count: int) -> npt.NDArray[np.float64]:
    """Return shares (K,), drawn as logarithms so that a tiny alpha does not give all zeros."""
    # Gamma(a) is Gamma(a + 1) U^(1/a) (Marsaglia and Tsang 2000).
    logs = np.log(draw.gamma(alpha + 1, size=count)) + np.log(draw.uniform(size=count)) / alpha
    sizes = np.exp(logs - logs.max())
    shares: npt.NDArray[np.float64] = sizes / sizes.sum()
    return shares
