"""The first weights of a federation: given ones get a silent head, random ones stay as timm's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medspark.federate.config import FederationConfig
from medspark.federate.network import new_network
from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.torchvision_ops import import_timm

NAME = "test_resnet"


def answers(weights: Path | None, *, classes: int = 2) -> torch.Tensor:
    """Return the logits of a new network for so many classes."""
    model = {"name": NAME, "weights": weights and str(weights)}
    manifest: Any = SimpleNamespace(classes=range(classes), channels=3, height=64, width=64)
    network = new_network(FederationConfig.model_validate({"model": model}), manifest)
    return network.eval()(torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize(("classes", "silent"), [(2, True), (1000, False)])
def test_a_head_on_given_weights_is_silent_if_it_is_new(tmp_path: Path, classes: int, silent: bool):
    trained = import_timm().create_model(NAME)
    save_file(trained.state_dict(), tmp_path / "given.safetensors")

    found = answers(tmp_path / "given.safetensors", classes=classes)

    assert bool((found == 0).all()) == silent


def test_a_trained_model_keeps_its_head(tmp_path: Path):
    model = build(ModelConfig(name=NAME), num_classes=2, channels=3)
    card = describe(model, classes=("A", "B"), height=64, width=64)
    save_classifier(tmp_path, model, card)

    assert answers(tmp_path).abs().max() > 0


def test_random_weights_keep_timms_head():
    assert answers(None).abs().max() > 0
