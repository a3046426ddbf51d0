"""A network with noisy weights is judged piece by piece as in one go, and kept pieces are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medspark.data.native import MappedSplit
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.noisy import judge_noise, judged_rows
from medspark.evaluate.noisy_pieces import NoisyJob
from medspark.models.backbones import build
from medspark.models.card import Pruning
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.masks import prunable
from medspark.shards.manifest import read_manifest

CONFIG = AttackSettings(eps=(0.0, 2 / 255), steps=1, sanity_images=6, batch_size=3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    pruning = Pruning(method="noise", sparsity=0.0, noise=True)
    card = describe(network, classes=("a", "b"), height=32, width=32, pruning=pruning)
    scales = {
        name.removesuffix("weight") + "noise": torch.full((len(weight),), 0.5)
        for name, weight in prunable(network).items()
    }
    save_classifier(tmp_path / "model", network, card, noise=scales)
    return tmp_path / "model"


def test_pieces_give_the_figures_of_one_pass(
    model: Path, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = write_shards(rows=16, side=32)
    job = NoisyJob(model, shards, "test", CONFIG, total=16, piece=3, work=tmp_path / "pieces")
    job.work.mkdir()
    for number in job.missing():
        job.do(number)

    split = MappedSplit(shards, read_manifest(shards), "test")
    rows = torch.from_numpy(judged_rows(CONFIG, 16)).split(3)
    whole = judge_noise(
        load_classifier(model, noisy=True),
        [(*split.tensors(r.numpy()), r) for r in rows],
        threat=CONFIG.threat(2 / 255),
        steps=1,
        seed=0,
    )
    assert job.result() == whole
    assert whole.images == 6
    assert job.missing() == []
