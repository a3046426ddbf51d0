"""Folding frozen batch norm changes how the network is computed, not what it computes or learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from medspark.models.backbones import build
from medspark.models.classifier import Classifier, batch_norms, freeze_batch_norm
from medspark.models.config import ModelConfig
from medspark.models.kernels.fold import fold

IMAGES = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def lively(model: Classifier) -> Classifier:
    """Give the batch norms of ``model`` random statistics and scales."""
    generator = torch.Generator().manual_seed(1)
    for layer in batch_norms(model):
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2.0, generator=generator)
        layer.weight.data.uniform_(-1.0, 2.0, generator=generator)
        layer.bias.data.normal_(generator=generator)
    freeze_batch_norm(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "left"), [("test_efficientnet", 0), ("test_resnet", 0), ("densenet121", 62)]
)
def test_real_networks_fold_and_unfold_to_the_same_logits(name: str, left: int):
    model = lively(build(ModelConfig(name=name), num_classes=3, channels=1)).double()
    images = IMAGES.double()
    expected = model(images)

    folded = fold(model, images)

    assert len(list(batch_norms(folded.trained))) == left
    assert torch.allclose(folded.trained(images), expected)
    assert torch.allclose(folded.unfold()(images), expected)


def test_what_the_folded_network_learns_is_in_the_kept_one(tiny: Callable[..., Classifier]):
    model = lively(tiny()).double()
    folded = fold(model, IMAGES[..., :12, :12].double())
    images = IMAGES[..., :12, :12].double()
    optimiser = torch.optim.Adam(folded.trained.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        folded.trained(images).square().sum().backward()
        optimiser.step()

    assert folded.kept is model
    assert torch.allclose(folded.unfold()(images), folded.trained(images))


def test_a_channel_that_batch_norm_has_switched_off_can_come_back(
    tiny: Callable[..., Classifier],
):
    model = lively(tiny()).double()
    next(iter(batch_norms(model))).weight.data[0] = 0.0
    images = IMAGES[..., :12, :12].double()
    folded = fold(model, images)
    next(folded.trained.parameters()).data[0] = 1.0

    assert torch.allclose(folded.unfold()(images), folded.trained(images))


def test_moving_batch_norm_is_left_alone(tiny: Callable[..., Classifier]):
    model = tiny()

    folded = fold(model, IMAGES[..., :12, :12])

    assert folded.trained is folded.kept is model


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_with_a_bias_are_folded_as_those_without(bias: bool):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        *[nn.Conv2d(1, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU()],
        *[nn.Conv2d(4, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)],
    )
    model = lively(Classifier(backbone, architecture="biased", mean=[0.4], std=[0.2])).double()
    images = IMAGES.double()
    expected = model(images)

    folded = fold(model, images)

    assert len(folded.pairs) == 2
    assert not list(batch_norms(folded.trained))
    torch.testing.assert_close(folded.trained(images), expected)
    torch.testing.assert_close(folded.unfold()(images), expected)


class Branching(nn.Module):
    """A convolution whose output is also used without its batch norm, so folding is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        return (self.norm(features) + features).mean((2, 3))


def test_a_network_that_folding_would_change_is_trained_as_it_is():
    model = lively(Classifier(Branching(), architecture="branching", mean=[0.4], std=[0.2]))

    folded = fold(model, IMAGES)

    assert folded.trained is folded.kept is model
    assert len(list(batch_norms(model))) == 1
