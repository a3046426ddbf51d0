"""A convolution as a matrix product is the same convolution, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medspark.models.kernels.casts import cast_weights_once
from medspark.models.kernels.lower import lower
from medspark.models.kernels.matrix_conv import MatrixConv2d


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [
        (1, 1, 0, True),
        (1, 2, 0, False),
        (3, 1, 1, True),
        (3, 2, 1, False),
        ((1, 3), 1, (0, 1), True),
    ],
    ids=str,
)
def test_the_product_is_the_convolution(
    kernel: int,
    stride: int,
    padding: int,
    bias: bool,
    layout: torch.memory_format,
    gradients: Callable,
):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, kernel, stride=stride, padding=padding, bias=bias).double()
    plain = nn.Sequential(conv).to(memory_format=layout)
    images = torch.rand(2, 64, 3, 5, dtype=torch.float64).to(memory_format=layout)
    lowered = copy.deepcopy(plain)

    assert lower(lowered, images, batch_size=1) == 1

    assert type(lowered[0]) is MatrixConv2d
    pairs = zip(gradients(plain, images), gradients(lowered, images), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_of_its_gradient_is_that_of_the_convolution(kernel: int):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, kernel, padding=kernel // 2).double()
    plain = nn.Sequential(conv, nn.Softplus())
    images = torch.rand(2, 32, 2, 2, dtype=torch.float64)
    lowered = copy.deepcopy(plain)
    lower(lowered, images, batch_size=1)

    def steepness(model: nn.Module) -> list[Tensor]:
        x = images.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [slope, *(p.grad for p in model.parameters() if p.grad is not None)]

    assert type(lowered[0]) is MatrixConv2d
    pairs = zip(steepness(plain), steepness(lowered), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_the_compiler_takes_it_whole():
    torch.manual_seed(0)
    lowered = nn.Sequential(nn.Conv2d(64, 96, 1), nn.ReLU(inplace=True))
    images = torch.rand(2, 64, 2, 2)
    lower(lowered, images, batch_size=1)
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)

    with cast_weights_once("cpu"):
        assert torch.allclose(compiled(images), lowered(images), atol=1e-6)


def test_gradients_before_an_activation_in_place_stay_channels_last():
    torch.manual_seed(0)
    images = torch.rand(2, 64, 2, 2).contiguous(memory_format=torch.channels_last)
    lowered = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(inplace=True))
    lower(lowered, images, batch_size=1)
    x = images.requires_grad_(True)

    output = lowered(x)
    output.square().sum().backward()

    assert x.grad is not None
    assert not output._is_view()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
