"""The copy of a model on which attacks run."""

import copy

import pytest
import torch

from medspark.evaluate.deploy import evaluation_copy
from medspark.models.backbones import build
from medspark.models.classifier import Classifier, batch_norms
from medspark.models.config import ModelConfig


def trained(name: str) -> Classifier:
    """Return a random network whose batch norms have something to fold."""
    model = build(ModelConfig(name=name), num_classes=3, channels=1).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 1, 64, 64))
        for layer in batch_norms(model):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
    return model.eval()


@pytest.mark.parametrize("name", ["mobilenetv2_100", "densenet121", "resnet50"])
def test_the_copy_answers_the_same(name: str) -> None:
    model, images = trained(name), torch.rand(3, 1, 64, 64)

    with torch.no_grad():
        expected, found = model(images), evaluation_copy(model, images)(images)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "left"), [("mobilenetv2_100", 0), ("resnet50", 0), ("densenet121", 62)]
)
def test_batch_norms_after_a_convolution_are_gone(name: str, left: int) -> None:
    model = build(ModelConfig(name=name), num_classes=2, channels=1)

    copied = evaluation_copy(model, torch.rand(2, 1, 32, 32))

    assert len(list(batch_norms(copied))) == left


def test_the_model_itself_is_not_changed() -> None:
    model = trained("test_resnet").train()
    before = copy.deepcopy(model.state_dict())

    copied = evaluation_copy(model, torch.rand(2, 1, 32, 32))

    assert model.training
    assert not copied.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Branching(torch.nn.Module):
    """A convolution whose output is also used without its batch norm, so folding is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)
        torch.nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        return (self.norm(features) + features).mean((2, 3))


def test_a_network_that_cannot_be_folded_is_left_as_it_is() -> None:
    model, images = Branching().eval(), torch.rand(2, 1, 8, 8)

    copied = evaluation_copy(model, images)

    assert len(list(batch_norms(copied))) == 1
    assert torch.equal(copied(images), model(images))
