"""The trained network is the configured one, for every setting of batch norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medspark.data.config import DataConfig
from medspark.data.source import open_source
from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.classifier import Classifier, batch_norms
from medspark.train import prepare
from medspark.train.config import FitConfig
from medspark.train.objective import (
    BinaryCrossEntropy,
    CrossEntropy,
    balanced_positive_weights,
    balanced_weights,
)
from medspark.train.prepare import (
    make_network,
    make_objective,
    validation_split,
    watched_images,
)
from medspark.train.world import World


def network(synchronise: bool, *, rows: int = 50, ranks: int = 2) -> Classifier:
    """Return the network that is trained on so many images, in batches of at most 4."""
    manifest = SimpleNamespace(classes=("a", "b"), channels=1, height=32, width=32)
    source: Any = SimpleNamespace(manifest=manifest, split=lambda _: range(rows))
    train = {"mode": "standard", "sync_batch_norm": synchronise, "batch_size": 4}
    config = FitConfig.model_validate(
        {"shards": Path("unused"), "model": {"name": "test_efficientnet"}, "train": train}
    )
    # The network is moved there later.
    return make_network(config, source, World(0, 0, ranks, torch.device("cuda", 0)))


def test_synchronised_batch_norm_changes_no_answer():
    plain, synchronised = (network(synchronise).eval() for synchronise in (False, True))
    images = torch.rand(3, 1, 32, 32)

    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(synchronised))
    assert torch.equal(synchronised(images), plain(images))


def test_batch_norm_is_not_synchronised_with_a_process_that_has_no_image():
    assert network(True, rows=48, ranks=4)

    with pytest.raises(UsageError, match=r"each of the 4 processes .* some steps have 3"):
        network(True, rows=47, ranks=4)


def fit_config(**chosen: Any) -> FitConfig:
    return FitConfig.model_validate(
        {"shards": "unused", "model": {"name": "test_efficientnet"}} | chosen
    )


def made(monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> Classifier:
    """Return the network that a configuration asks for, where weights are there for the asking."""
    untrained = lambda config, **sizes: build(  # noqa: E731 - stands for one function
        config.model_copy(update={"weights": None}), **sizes
    )
    monkeypatch.setattr(prepare, "first_network", untrained)
    source: Any = SimpleNamespace(
        manifest=SimpleNamespace(classes=("a", "b"), channels=1, height=32, width=32)
    )
    return make_network(fit_config(**chosen), source, World(0, 0, 1, torch.device("cpu")))


WEIGHTS = {"name": "test_efficientnet", "weights": "given.safetensors"}


@pytest.mark.parametrize(
    ("chosen", "frozen"),
    [
        ({"model": WEIGHTS}, True),
        ({}, False),
        ({"model": WEIGHTS, "train": {"mode": "standard"}}, False),
        ({"model": WEIGHTS, "train": {"batch_norm": "train"}}, False),
        ({"model": WEIGHTS, "train": {"batch_norm": "settle"}}, False),
        ({"model": WEIGHTS, "train": {"dual_bn": True}}, False),
        ({"model": WEIGHTS, "prune": {"method": "magnitude"}}, False),
        ({"model": WEIGHTS, "prune": {}, "train": {"batch_norm": "frozen"}}, True),
        ({"model": WEIGHTS, "distill": {"teacher": "t", "method": "kd"}}, False),
        ({"model": WEIGHTS, "distill": {"teacher": "t", "method": "rslad"}}, True),
        ({"train": {"batch_norm": "frozen", "mode": "standard"}}, True),
    ],
)
def test_batch_norm_is_frozen_for_attacks_on_given_weights_or_where_that_is_asked_for(
    chosen: dict[str, Any], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(monkeypatch, **chosen).batch_norm_frozen == frozen


def test_weights_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (
        next(made(monkeypatch, seed=seed).parameters()).detach().clone() for seed in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "chosen",
    [
        {"train": {"dual_bn": True, "mode": "pgd"}},
        {"train": {"dual_bn": True, "batch_norm": "frozen"}},
        {"train": {"dual_bn": True}, "distill": {"teacher": "t"}},
    ],
)
def test_two_norms_are_refused_where_one_of_them_would_have_no_images(
    chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"train\.dual_bn needs one of the modes"):
        made(monkeypatch, **chosen)


@pytest.mark.parametrize("findings", [0, 3])
@pytest.mark.parametrize("balance", ["none", "balanced"])
def test_the_loss_is_the_one_for_the_labels_with_all_that_was_asked_for(
    balance: str, findings: int, write_shards: Callable[..., Path]
) -> None:
    source = open_source(write_shards(rows=21, findings=findings), DataConfig())
    train = {"class_weights": balance, "label_smoothing": 0.1, "temperature": 2.0}

    loss = make_objective(fit_config(train=train), source, World(0, 0, 1, torch.device("cpu")))

    labels, weights = source.split("train").labels, None
    if balance == "balanced" and findings:
        weights = balanced_positive_weights(labels.sum(0).tolist(), 21)
    elif balance == "balanced":
        weights = balanced_weights([11, 10])
    kind = BinaryCrossEntropy if findings else CrossEntropy
    logits = torch.linspace(-1, 1, 21 * (findings or 2)).view(21, -1)
    given = torch.from_numpy(labels)
    assert torch.equal(loss(logits, given), kind(weights, 0.1, 2.0)(logits, given))


def test_epochs_are_compared_on_validation_images_or_on_those_that_are_there(
    write_shards: Callable[..., Path],
) -> None:
    source = open_source(write_shards(rows=21), DataConfig())
    without = source.manifest.model_copy(
        update={"splits": {k: v for k, v in source.manifest.splits.items() if k != "val"}}
    )

    names: list[str] = []
    for manifest in (source.manifest, without):
        watched: Any = SimpleNamespace(manifest=manifest, split=names.append)
        validation_split(watched)

    assert names == ["val", "train"]


def test_the_monitor_watches_training_images_that_the_seed_chooses(
    write_shards: Callable[..., Path],
) -> None:
    source = open_source(write_shards(rows=50), DataConfig())
    asked: list[str] = []
    watched: Any = SimpleNamespace(split=lambda name: (asked.append(name), source.split(name))[1])
    world = World(0, 0, 1, torch.device("cpu"))
    train = {"monitor": {"images": 12}}

    first, again, other = (
        watched_images(watched, fit_config(seed=seed, train=train), world) for seed in (1, 1, 2)
    )

    assert set(asked) == {"train"}
    assert first[0].shape == (12, 1, 6, 6)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    rows = first[0][:, 0, 3, 3].mul(255).round().long()
    assert len(rows.unique()) == 12
