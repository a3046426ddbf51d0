"""Narrower layers, from nothing but the sizes in a model card."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.models.widths import narrow, widths_of


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def test_a_narrowed_network_has_the_widths_and_runs() -> None:
    wanted = {"0": (5, 1), "1": (5, 5), "2": (5, 5), "4": (2, 5)}
    model = chain()

    narrow(model, wanted)

    assert widths_of(model) == wanted
    assert model(torch.rand(2, 1, 5, 5)).shape == (2, 2)
    assert model[2].groups == 5


def test_its_own_widths_change_no_shape_of_a_network() -> None:
    model = build(ModelConfig(name="mobilenetv2_100"), num_classes=2, channels=1)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    narrow(model, widths_of(model))

    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"7": (1, 1)}, "there is no layer 7"),
        ({"0": (9, 1)}, "0 cannot have 9"),
        ({"0": (0, 1)}, "0 cannot have 0"),
        ({"4": (2, 9)}, "4 cannot have 2"),
        ({"2": (5, 4)}, "2 is a convolution in groups"),
    ],
)
def test_a_card_cannot_widen_a_layer_or_name_one_that_is_not_there(widths, message) -> None:
    with pytest.raises(ValueError, match=message):
        narrow(chain(), widths)
