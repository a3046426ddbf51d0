"""The recipe of a client over all rounds: train_at's schedule, and what becomes of batch norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny_network

from medspark.attacks.threat import ThreatModel
from medspark.data.config import AugmentConfig
from medspark.data.native import NativeReader
from medspark.errors import UsageError
from medspark.federate.config import FederationConfig
from medspark.federate.weights import pack

THREAT = ThreatModel(eps=8 / 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("schedule") / "shards")


@pytest.fixture
def start() -> np.ndarray:
    return pack(small.network(), "frozen")


@pytest.mark.parametrize("mode", ["standard", "fused"])
def test_one_client_follows_the_recipe_of_train_at(folder: Path, mode: Any):
    """Frozen batch norms are left out: train_at does not train the scales that it folds away."""
    recipe = {"batch_size": 8, "lr": 0.01, "weight_decay": 0.05, "clip_grad": 0.5}
    own = {"optimiser": "adamw", "schedule": "one_cycle", "batch_norm": "average", "epochs": 2}
    config, start = small.local(mode, attack=THREAT, **own | recipe), small.network()
    answer = small.train(folder, pack(start, "average"), config, augmentation=AugmentConfig())

    engine = tiny_network.engine_for(small.network(), steps=6, mode=mode, **recipe)
    reader = NativeReader(
        small.rows_of(folder), global_batch=8, seed=0, rank=0, world=1, augmentation=AugmentConfig()
    )
    for step, batch in enumerate([*reader.batches(0), *reader.batches(1)]):
        engine.step(batch, step)

    with engine.deployable() as alone:
        gap = np.abs(answer.weights - pack(alone, "average")).max()
    assert gap < 1e-4 < 0.01 < np.abs(answer.weights - pack(start, "average")).max()


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, "average"),
        ({"model": {"weights": "given.safetensors"}}, "frozen"),
        ({"batch_norm": "reestimate"}, "reestimate"),
    ],
)
def test_a_federation_freezes_the_statistics_of_given_weights_alone(
    settings: dict[str, Any], policy: str
):
    assert FederationConfig.model_validate(settings).batch_norm == policy


def test_bf16_makes_another_federation_and_float32_the_one_of_before():
    plain, lower = (FederationConfig(precision=p).deciding_weights() for p in ("fp32", "bf16"))

    assert "precision" not in plain
    assert lower == plain | {"precision": "bf16"}


def test_a_schedule_spans_all_rounds():
    config = small.local(schedule="one_cycle", lr=0.1, lr_decay=0.5, attack=THREAT)
    rates = [config.rate_at(step, 20, round=0) for step in range(20)]
    budgets = [config.threat_at(step, 20).eps for step in range(20)]

    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] < 1e-4 < rates[0] < 0.01
    assert budgets == pytest.approx([min(1, (step + 1) / 6) * THREAT.eps for step in range(20)])
    assert config.rate_at(5, 20, round=2) == pytest.approx(0.025)


def test_a_constant_schedule_attacks_with_all_of_eps_from_the_first_step():
    config = small.local(lr=0.1, lr_decay=0.5, attack=THREAT)

    assert [config.rate_at(0, 20, round=round) for round in (0, 2)] == [0.1, 0.025]
    assert config.threat_at(0, 20) == THREAT


def test_a_round_goes_on_where_the_schedule_was(folder: Path, start: np.ndarray):
    config = small.local(schedule="one_cycle", clip_grad=0)

    early, late = (
        small.train(folder, start, config, round=round, rounds=10).weights for round in (3, 9)
    )

    assert np.abs(late - start).max() < 0.1 * np.abs(early - start).max()


def test_a_round_after_the_last_of_a_schedule_is_refused(folder: Path, start: np.ndarray):
    with pytest.raises(UsageError, match="ends after 3 rounds; this is round 4"):
        small.train(folder, start, small.local(schedule="one_cycle"), round=3, rounds=3)
