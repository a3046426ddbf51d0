"""Normalisation inside the model, and batch norm that stays frozen."""

import pytest
import torch

from medspark.models.backbones import build
from medspark.models.classifier import (
    Classifier,
    Normalise,
    batch_norms,
    evaluating,
    freeze_batch_norm,
)
from medspark.models.config import ModelConfig


@pytest.fixture
def classifier() -> Classifier:
    return build(ModelConfig(name="test_resnet"), num_classes=3, channels=1)


def test_normalisation_shifts_and_scales_each_channel() -> None:
    normalise = Normalise([0.5, 0.25], [0.5, 0.25])

    out = normalise(torch.ones(1, 2, 1, 1))

    assert out.flatten().tolist() == [1.0, 3.0]


def test_frozen_batch_norm_stays_in_eval_mode_while_the_rest_trains(classifier: Classifier) -> None:
    freeze_batch_norm(classifier)

    classifier.train()

    assert classifier.training
    assert not any(layer.training for layer in batch_norms(classifier))


def test_a_training_step_moves_no_frozen_statistics(classifier: Classifier) -> None:
    freeze_batch_norm(classifier)
    classifier.train()
    before = {name: value.clone() for name, value in classifier.named_buffers()}

    classifier(torch.rand(4, 1, 32, 32)).sum().backward()

    assert all(torch.equal(value, before[name]) for name, value in classifier.named_buffers())


def test_every_layer_gets_its_own_mode_back_after_evaluating(classifier: Classifier) -> None:
    freeze_batch_norm(classifier)
    classifier.train()

    with evaluating(classifier):
        assert not any(module.training for module in classifier.modules())

    assert classifier.training
    assert not any(layer.training for layer in batch_norms(classifier))
