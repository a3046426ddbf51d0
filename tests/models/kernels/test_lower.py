"""Lowered layers compute the same; layers that would not be faster stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.models.kernels.lower import Float32Conv2d, PaddedConv2d, lower
from medspark.models.kernels.matrix_conv import MatrixConv2d


@pytest.mark.parametrize(("stride", "kind"), [(1, PaddedConv2d), (2, Float32Conv2d)])
def test_depthwise_layers_are_lowered_to_the_same_convolution(
    stride: int, kind: type[nn.Conv2d], gradients: Callable
):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, stride=stride, padding=1, groups=16).double())
    images = torch.rand(2, 16, 2, 2, dtype=torch.float64)
    lowered = copy.deepcopy(plain)

    assert lower(lowered, images, batch_size=1) == 1

    assert type(lowered[0]) is kind
    pairs = zip(gradients(plain, images), gradients(lowered, images), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_a_strided_depthwise_layer_computes_in_float32_between_bf16_layers():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16))
    images = torch.rand(2, 16, 8, 8).bfloat16()
    lowered = copy.deepcopy(plain)
    lower(lowered, images.float(), batch_size=2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lowered(images)

    assert output.dtype == torch.bfloat16
    assert torch.equal(output, plain(images.float()).bfloat16())


def test_only_layers_with_many_weights_for_few_positions_are_lowered():
    model = build(ModelConfig(name="resnet50"), num_classes=2, channels=1)

    lower(model, torch.rand(1, 1, 64, 64), batch_size=32)

    lowered = {n for n, m in model.named_modules() if type(m) is MatrixConv2d}
    assert "backbone.layer4.1.conv2" in lowered
    assert "backbone.layer3.1.conv3" in lowered
    assert not any(name.startswith(("backbone.layer1", "backbone.conv1")) for name in lowered)


def test_names_and_weights_stay():
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lower(model, torch.rand(1, 1, 16, 16), batch_size=1)

    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
