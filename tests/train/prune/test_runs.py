"""A pruning from shards to a pruned folder: its result, how it resumes, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import read_card
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.classifier import batch_norms
from medspark.models.config import ModelConfig
from medspark.models.masks import prunable, zero_share
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
WriteShards = Callable[..., Path]


class CrashError(Exception):
    """Simulates a lost machine."""


class Losses:
    """Keeps the loss of every step, and may end the process at one of them."""

    def __init__(self, crash_at: int = -1) -> None:
        self.by_step: dict[int, float] = {}
        self._crash_at = crash_at

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            self.by_step[step] = metrics["loss"]
            if step == self._crash_at:
                raise CrashError


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    for norm in batch_norms(model):  # timm starts some at zero, and folded weights would be zero
        torch.nn.init.ones_(norm.weight)
    card = describe(model, classes=("a", "b"), height=32, width=32)
    save_classifier(tmp_path / "network", model, card)
    return tmp_path / "network"


def configure(shards: Path, run_dir: Path, network: Path, **changed: Any) -> FitConfig:
    train = {"epochs": 2, "batch_size": 11, "precision": "fp32", "log_every": 2}
    return FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": run_dir,
            "model": {"name": "test_resnet", "weights": str(network)},
            "checkpoint": {"every_steps": 3, "keep": 1},
            "train": train | changed.pop("train", {}),
            "evaluate": {"attacks": ["fgsm"], "steps": 2, "sanity_images": 8},
        }
        | changed
    )


@pytest.mark.parametrize("method", ["rsr", "magnitude", "lasso", "noise", "hydra"])
def test_the_saved_network_has_the_sparsity_of_the_result_and_its_card_says_how(
    method: str, write_shards: WriteShards, network: Path, tmp_path: Path
) -> None:
    how = {"method": method, "sparsity": 0.75}
    shards = write_shards(rows=44, side=32)

    result = fit(configure(shards, tmp_path / "run", network, prune=how), ALONE, Losses())

    card = read_card(Path(result["model"]))
    assert card.kind == "pruned"
    assert (card.pruning.method, card.pruning.noise) == (method, method in ("rsr", "noise"))
    weights = prunable(load_classifier(Path(result["model"])))
    assert result["sparsity"] == zero_share(weights) == pytest.approx(0.75, abs=1e-4)
    assert result["multiply_adds_removed"] == 0
    assert ("noise" in result) == card.pruning.noise
    assert result["mode"] == method


@pytest.mark.parametrize("crash_at", [3, 6])
@pytest.mark.parametrize("train", [{}, {"batch_norm": "settle", "ema": 0.9}], ids=str)
def test_a_resumed_pruning_ends_with_the_weights_of_the_unbroken_one(
    crash_at: int, train: dict, write_shards: WriteShards, network: Path, tmp_path: Path
) -> None:
    shards, how = write_shards(rows=44, side=32), {"method": "rsr", "sparsity": 0.5}
    settings = {"prune": how, "train": train}
    whole, resumed = Losses(), Losses()
    first = fit(configure(shards, tmp_path / "whole", network, **settings), ALONE, whole)
    with pytest.raises(CrashError):
        fit(configure(shards, tmp_path / "b", network, **settings), ALONE, Losses(crash_at + 1))

    second = fit(configure(shards, tmp_path / "b", network, **settings), ALONE, resumed)

    assert min(resumed.by_step) > crash_at - 1
    one, other = (load_classifier(Path(r["model"])).state_dict() for r in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first["noise"] == second["noise"]


def test_fine_tuning_a_pruned_network_keeps_its_zeros_and_its_kind(
    write_shards: WriteShards, network: Path, tmp_path: Path
) -> None:
    shards = write_shards(rows=44, side=32)
    how = {"method": "noise", "sparsity": 0.9}
    pruned = fit(configure(shards, tmp_path / "run", network, prune=how), ALONE, Losses())
    before = prunable(load_classifier(Path(pruned["model"])))

    tuned = fit(
        configure(shards, tmp_path / "more", Path(pruned["model"]), train={"weight_decay": 0.1}),
        ALONE,
        Losses(),
    )

    after = prunable(load_classifier(Path(tuned["model"])))
    assert tuned["sparsity"] == pruned["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert all(torch.equal(after[name] == 0, weight == 0) for name, weight in before.items())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    card = read_card(Path(tuned["model"]))
    assert (card.kind, card.pruning.noise) == ("pruned", False)


def test_structured_pruning_is_fine_tuned_twice_and_stays_narrow(
    write_shards: WriteShards, network: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch_pruning", reason="structured: pip install medspark[prune]")
    shards = write_shards(rows=44, side=32)
    how = {"method": "magnitude", "sparsity": 0.5, "structured": True}

    narrow = fit(configure(shards, tmp_path / "run", network, prune=how), ALONE, Losses())
    tuned = fit(configure(shards, tmp_path / "more", Path(narrow["model"])), ALONE, Losses())

    assert narrow["multiply_adds_removed"] == tuned["multiply_adds_removed"] >= 0.5
    first, second = (read_card(Path(r["model"])).pruning for r in (narrow, tuned))
    assert first.widths == second.widths != {}


def test_only_epochs_after_the_cut_are_kept(write_shards, network: Path, tmp_path: Path) -> None:
    how = {"method": "lasso", "sparsity": 0.5, "cut_after": 0.6}
    # With fixed statistics the first epoch has the better score.
    train, shards = {"batch_norm": "frozen"}, write_shards(rows=44, side=32)

    result = fit(
        configure(shards, tmp_path / "run", network, prune=how, train=train), ALONE, Losses()
    )

    assert result["validation"]["epoch"] == 2


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prune": {"structured": True}}, "structured removes channels by magnitude"),
        ({"prune": {}, "train": {"monitor": {"action": "restore"}}}, "monitor.action restore"),
        ({"prune": {}, "train": {"dual_bn": True, "mode": "fused"}}, "and no pruning"),
    ],
)
def test_settings_that_exclude_each_other_are_one_sentence(
    changed, sentence, write_shards: WriteShards, network: Path, tmp_path: Path
) -> None:
    config = configure(write_shards(rows=44, side=32), tmp_path / "run", network, **changed)

    with pytest.raises(UsageError, match=sentence):
        fit(config, ALONE, Losses())
