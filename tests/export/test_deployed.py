"""Attacks on an exported graph: through its twins, and on the graph itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SIDE, images, network
from test_runtime import export

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.summary import worst_cases
from medspark.export.deployed import (
    STRAIGHT_THROUGH,
    ComparedJob,
    DeployedClassifier,
    DeployedJob,
    straight_through,
)
from medspark.export.onnx import export_onnx
from medspark.export.quantise import Format, prepared, quantised
from medspark.export.runtime import DeployedModel
from medspark.export.straight_through import StraightThrough

ROWS = 24
SETTINGS = AttackSettings(
    attacks=("transfer", "square"), eps=(4 / 255,), steps=3, queries=5, batch_size=7
)


@pytest.fixture
def job(tmp_path: Path, model: Path, shards: Path) -> DeployedJob:
    ready = prepared(export_onnx(network(), height=SIDE, width=SIDE))
    graph = quantised(ready, images(16).numpy(), Format("U8", "S8", "QDQ"))
    (tmp_path / "surrogate.onnx").write_bytes(graph)
    (tmp_path / "work").mkdir()
    return DeployedJob(
        model=export(tmp_path / "exported", model),
        twin=model,
        surrogate=tmp_path / "surrogate.onnx",
        shards=shards,
        split="test",
        config=SETTINGS,
        total=ROWS,
        piece=10,
        work=tmp_path / "work",
    )


def test_every_attack_is_on_every_image_and_the_worst_case_is_below_each(job: DeployedJob) -> None:
    for number in job.missing():
        job.do(number)
    arrays = job.arrays()

    trials = SETTINGS.trials(job.own_attacks)
    assert [trial.name for trial in trials] == ["transfer", "square", STRAIGHT_THROUGH]
    assert arrays["rows"].tolist() == list(range(ROWS))
    ((_, worst),) = worst_cases(arrays, trials)
    truth = np.arange(ROWS), arrays["labels"]
    assert all((worst[truth] <= arrays[trial.key][truth] + 1e-6).all() for trial in trials)
    assert not any(arrays[f"{trial.key}/outside"].any() for trial in trials)


def test_a_float_graph_has_no_attack_through_rounding(job: DeployedJob) -> None:
    assert DeployedJob(**(vars(job) | {"surrogate": None})).own_attacks == ()


def test_the_attack_through_rounding_harms_the_quantised_graph() -> None:
    ready = prepared(export_onnx(network(), height=SIDE, width=SIDE))
    twin = StraightThrough(quantised(ready, images(16).numpy(), Format("U8", "S8", "QDQ")))
    batch, threat = images(8), ThreatModel(eps=8 / 255)
    labels = twin(batch).argmax(1)

    attack = straight_through(twin, steps=5)
    attacked = attack(twin, batch, labels, threat, KeyedRandom.for_whole(batch))

    def margin(pixels: torch.Tensor) -> torch.Tensor:
        logits = twin(pixels)
        return logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])

    assert threat.holds(attacked, batch).all()
    assert (margin(attacked) < margin(batch)).float().mean() > 0.5


def test_the_deployed_graph_gives_no_gradient(job: DeployedJob) -> None:
    deployed = DeployedClassifier(DeployedModel.load(job.model))

    assert not deployed.gradients
    assert not deployed(images(2).requires_grad_()).requires_grad


def test_every_image_gets_the_answers_of_twin_and_exports(job: DeployedJob, tmp_path) -> None:
    compared = ComparedJob(
        twin=job.twin, exports=(job.model,), shards=job.shards, split="test", total=ROWS, piece=9,
        batch=4, work=tmp_path / "work",
    )  # fmt: skip
    for number in compared.missing():
        compared.do(number)

    arrays = compared.arrays()

    assert sorted(arrays) == ["exported", "labels", "rows", "twin"]
    np.testing.assert_allclose(arrays["exported"], arrays["twin"], atol=1e-4)
