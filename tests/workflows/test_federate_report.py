"""The report on a federation says which network its figures are of, and on whose images."""

from __future__ import annotations

from typing import Any

import pytest

from medspark.federate.result import FederationResult
from medspark.workflows.federate_report import describe_federation

CLIENT = {"client": 0, "images": 4, "clean": {"accuracy": 0.75}}
USUAL: dict[str, Any] = {
    "images": 4,
    "clean": {"accuracy": 0.5},
    "mode": "standard",
    "aggregate": "fedavg",
    "clients": 3,
    "clients_by": "site",
    "model": "m",
    "architecture": "a",
    "batch_norm": "frozen",
    "steps": 1,
    "train_images": 9,
    "dataset_digest": "0",
    "seconds": 1.0,
    "tasks": 1,
}


def told(**changes: Any) -> str:
    return describe_federation(FederationResult.model_validate(USUAL | changes))


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("local", "The network has the mean of the clients' batch norms"),
        ("reestimate", "The network has the batch norm statistics of validation images"),
    ],
)
def test_a_policy_that_has_several_networks_says_which_one_was_tested(policy: str, sentence: str):
    assert sentence in told(batch_norm=policy)
    assert sentence not in told()


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ("site", "Test images of the client's site."),
        ("dirichlet", "Test images drawn with the client's shares of the classes."),
        ("patient", "Groups of test patients; no client trained on one of them."),
    ],
)
def test_clients_are_on_the_report_with_whose_images_they_are_tested_on(by: str, sentence: str):
    found = told(clients_by=by, per_client=[CLIENT])

    assert f"## Clients\n\n{sentence}\n\n| client |" in found
    assert "| 0 | 4 | 75.0 |" in found
    assert "## Clients" not in told(clients_by=by)


def test_clients_own_networks_are_named():
    assert "with the client's own batch norms" in told(per_client=[CLIENT | {"own_network": True}])


def test_results_of_earlier_versions_have_a_report():
    earlier = {key: value for key, value in USUAL.items() if key != "clients_by"}

    found = describe_federation(FederationResult.model_validate(earlier | {"per_client": [CLIENT]}))

    assert "## Clients\n\n| client |" in found
