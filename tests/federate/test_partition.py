"""The clients of a simulated federation: every image once, no patient twice, skew as asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from draws import seeds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medspark.errors import UsageError
from medspark.federate.partition import ClientsConfig, clients_of, partition
from medspark.shards.groups import Groups
from medspark.shards.manifest import Split


def archive(seed: int, patients: int = 60, classes: int = 3) -> dict[str, Any]:
    """Return labels, patients and sites of an archive: a patient's images are mostly of a class."""
    draw = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), draw.integers(1, 6, patients))
    usual = draw.integers(0, classes, patients)
    labels = np.where(draw.uniform(size=len(who)) < 0.9, usual[who], 0)
    order = draw.permutation(len(who))
    return {
        "labels": labels[order],
        "patients": np.array([f"p{i:03d}" for i in who[order]]),
        "sites": np.array([f"s{i % 4}" for i in who[order]]),
    }


def split(data: dict[str, Any], seed: int = 0, **settings: Any) -> list[np.ndarray]:
    patients, sites = (Groups.of(data[name]) for name in ("patients", "sites"))
    config = ClientsConfig(**settings)
    return partition(config, labels=data["labels"], patients=patients, sites=sites, seed=seed)


WAYS = [
    {"by": "site"},
    {"by": "patient"},
    {"by": "patient", "count": 7},
    {"by": "dirichlet", "count": 9, "alpha": 0.05},
    {"by": "dirichlet", "count": 9, "alpha": 50.0},
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))


@every_way
@given(seed=seeds)
def test_the_number_of_clients_is_known_from_the_manifest(way: dict[str, Any], seed: int):
    data = archive(seed)
    names, images = np.unique(data["sites"], return_counts=True)
    for nameless in (0, 1):
        sites = dict(zip(names[nameless:], images.tolist()[nameless:], strict=True))
        rows, patients = len(data["labels"]), len(set(data["patients"]))
        known = Split(rows=rows, patients=patients, class_counts=(), sites=sites, shards=())

        assert clients_of(ClientsConfig(**way), known) == len(split(data, seed, **way))


@every_way
@given(seed=seeds)
def test_every_image_is_in_exactly_one_client_and_no_client_is_empty(
    way: dict[str, Any], seed: int
):
    data = archive(seed)

    clients = split(data, seed, **way)

    assert sorted(np.concatenate(clients).tolist()) == list(range(len(data["labels"])))
    assert all(len(rows) for rows in clients)


@every_way
@given(seed=seeds)
def test_no_patient_is_in_two_clients(way: dict[str, Any], seed: int):
    data = archive(seed)

    seen = [set(data["patients"][rows]) for rows in split(data, seed, **way)]

    assert sum(map(len, seen)) == len(set.union(*seen))


@every_way
@given(seed=seeds)
def test_the_order_of_the_rows_moves_no_image(way: dict[str, Any], seed: int):
    data = archive(seed)
    order = np.random.default_rng(seed).permutation(len(data["labels"]))
    shuffled = {name: values[order] for name, values in data.items()}

    one, other = split(data, seed, **way), split(shuffled, seed, **way)

    assert [r.tolist() for r in one] == [sorted(order[r].tolist()) for r in other]


def test_another_seed_gives_other_clients():
    data = archive(0)

    assert not np.array_equal(
        split(data, 1, by="patient", count=5)[0], split(data, 2, by="patient", count=5)[0]
    )


@given(seeds)
def test_clients_by_patient_are_alike_in_size(seed: int):
    sizes = [len(rows) for rows in split(archive(seed), seed, by="patient", count=7)]

    assert max(sizes) - min(sizes) <= 5  # no patient has more images


def test_label_skew_grows_as_alpha_falls():
    def skew(alpha: float) -> float:
        """Return how far clients' classes are from everybody's, in total variation, on average."""
        far = []
        for seed in range(20):
            data = archive(seed, patients=400)
            overall = np.bincount(data["labels"], minlength=3) / len(data["labels"])
            for rows in split(data, seed, by="dirichlet", count=8, alpha=alpha):
                own = np.bincount(data["labels"][rows], minlength=3) / len(rows)
                far.append(np.abs(own - overall).sum() / 2)
        return float(np.mean(far))

    skews = [skew(alpha) for alpha in (100.0, 1.0, 0.3, 0.03)]

    assert skews == sorted(skews)
    assert skews[0] < 0.1 < 0.3 < skews[-1]


def test_a_tiny_alpha_gives_nearly_every_class_to_one_client():
    data = archive(0, patients=400)

    clients = split(data, 0, by="dirichlet", count=8, alpha=1e-4)

    assert sum(len(rows) > 10 for rows in clients) <= 3


@given(seeds)
def test_findings_are_skewed_by_their_combination(seed: int):
    data = archive(seed, patients=200)
    data["labels"] = np.stack([data["labels"] & 1, data["labels"] >> 1], axis=1)

    clients = split(data, seed, by="dirichlet", count=4, alpha=0.01)

    assert sum(map(len, clients)) == len(data["labels"])


@given(seeds, st.integers(1, 60))
def test_one_client_holds_everything(seed: int, patients: int):
    data = archive(seed, patients)

    (rows,) = split(data, seed, by="dirichlet", count=1)

    assert rows.tolist() == list(range(len(data["labels"])))


def test_what_cannot_be_is_said_in_a_sentence():
    data = archive(0)

    nameless = Split(rows=3, patients=3, class_counts=(3,), shards=())
    with pytest.raises(UsageError, match="no sites"):
        clients_of(ClientsConfig(by="site"), nameless)
    with pytest.raises(UsageError, match="60 patients"):
        split(data, by="patient", count=61)
    with pytest.raises(ValidationError, match=r"clients\.count"):
        ClientsConfig(by="dirichlet")
    with pytest.raises(ValidationError, match=r"clients\.count"):
        ClientsConfig(by="site", count=3)
