"""Statistics of batch norms that clients exchange: averages, which no optimiser moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from pretended_rounds import Rounds, shards, tiny_networks_in_several_chunks

from medspark.federate.client import Answer, Memory, train_client
from medspark.federate.weights import Statistics, pack, unpack
from medspark.models.classifier import batch_norms

__all__ = ["shards", "tiny_networks_in_several_chunks"]

AVERAGE = {"batch_norm": "average"}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return Statistics.of(small.network(), "average")


def test_statistics_are_the_running_means_and_variances(statistics: Statistics):
    model: Any = small.network()
    for layer in batch_norms(model):
        layer.running_mean.fill_(7.0)
        layer.running_var.fill_(9.0)

    weights = pack(model, "average")

    assert set(weights[statistics.every]) == {7.0, 9.0}
    assert set(weights[statistics.variances]) == {9.0}
    assert not {7.0, 9.0} & set(weights[~statistics.every])
    for policy in ("frozen", "local", "reestimate"):
        assert not len(Statistics.of(model, policy).every)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("aggregate", ["fedavgm", "fedadam", "fedyogi"])
def test_the_servers_optimiser_leaves_statistics_to_the_mean(
    shards: Path, tmp_path: Path, statistics: Statistics, aggregate: str, parts: int
):
    mean = Rounds(shards, tmp_path / "mean", aggregate="fedavg", **AVERAGE)
    found = Rounds(shards, tmp_path / "found", parts=parts, aggregate=aggregate, **AVERAGE)

    mean.run(3)
    found.run(3)

    same = mean.weights == found.weights
    assert same[statistics.every].all()
    assert not same[~statistics.every].all()


def test_a_variance_that_an_outcome_would_lose_stays_as_it_was(
    shards: Path, tmp_path: Path, statistics: Statistics
):
    def falls(network: Any, rows: Any, task: Any, config: Any, **given: Any) -> Answer:
        return Answer(task.weights - np.float32(10), len(rows), 2, 0.5, Memory())

    rounds = Rounds(shards, tmp_path, train=falls, **AVERAGE)
    before = rounds.weights

    rounds.run()

    stay = rounds.weights == before
    assert stay[statistics.variances].all()
    assert not stay[~statistics.variances].any()


def test_networks_that_begin_with_random_weights_keep_variances_above_zero(
    shards: Path, tmp_path: Path
):
    more = {"aggregate": "fedavgm", "lr": 0.1, "epochs": 3, "rounds": 4}
    rounds = Rounds(shards, tmp_path, train=train_client, **more, **AVERAGE)
    model: Any = small.network()
    for layer in batch_norms(model):
        layer.momentum = 1.0

    rounds.run(4)

    unpack(model, rounds.weights, "average")
    assert all((layer.running_var >= 0).all() for layer in batch_norms(model))
