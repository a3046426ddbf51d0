"""A tiny network and batches for the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.models.classifier import Classifier
from medspark.train.config import TrainConfig
from medspark.train.engine import Engine
from medspark.train.gradients.one_host import OneHost
from medspark.train.learner import Sample, StepRule
from medspark.train.objective import CrossEntropy
from medspark.train.prune.pruner import Pruner
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def build_tiny(seed: int = 0) -> Classifier:
    """Return a network of two convolutions with batch norm, for 12 x 12 images of one channel."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    return Classifier(backbone, architecture="tiny", mean=[0.4], std=[0.2])


def build_sample(
    count: int = 10,
    *,
    dtype: torch.dtype = torch.float64,
    weight: float = 1.0,
    device: torch.device | None = None,
) -> Sample:
    """Return images (count, 1, 12, 12) of two classes that differ in a bright square."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, count)
    images = generator.uniform(0.2, 0.6, (count, 1, 12, 12))
    images[:, :, 4:8, 4:8] += 0.2 * labels[:, None, None, None]
    return Sample(
        images=torch.from_numpy(images).to(device, dtype),
        labels=torch.from_numpy(labels).to(device),
        rows=np.arange(count, dtype=np.int64),
        weight=weight,
        threat=ThreatModel(eps=8 / 255),
        key=11,
    )


def engine_for(
    model: Classifier,
    *,
    world: World = ALONE,
    steps: int = 4,
    image_shape: tuple[int, int, int] = (1, 12, 12),
    step_rule: StepRule | None = None,
    pruner: Pruner | None = None,
    **chosen: object,
) -> Engine:
    """Return an engine that trains ``model`` in float32 at eps 8/255; ``chosen`` are of `train`."""
    return Engine(
        model,
        config=TrainConfig.model_validate({"precision": "fp32"} | chosen),
        threat=ThreatModel(eps=8 / 255),
        objective=CrossEntropy(),
        image_shape=image_shape,
        total_steps=steps,
        seed=0,
        world=world,
        step_rule=step_rule,
        pruner=pruner,
    )


def over_sockets() -> AbstractContextManager[object]:
    """Return a context whose engines leave gradients to DDP, as between hosts."""
    return mock.patch.object(OneHost, "found", return_value=None)


@pytest.fixture
def tiny() -> Callable[..., Classifier]:
    """Return the function that builds the tiny network."""
    return build_tiny


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """Return the function that builds a step's images."""
    return build_sample


def both_ways(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the output of a pass, and the gradients of the images and of the parameters."""
    x = images.clone().requires_grad_(True)
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def gradients() -> Callable[..., list[Tensor]]:
    """Return the function that makes one pass forward and backward."""
    return both_ways
