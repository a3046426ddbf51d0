"""A wide depthwise convolution is the same convolution, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medspark.models.kernels.lower import lower
from medspark.models.kernels.wide_depthwise import WideDepthwiseConv2d


def depthwise(kernel: int | tuple[int, int] = 7, *, bias: bool = True, **options) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, kernel, groups=16, bias=bias, **options)
    return nn.Sequential(conv)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (8, 8)], ids=str)
@pytest.mark.parametrize(("kernel", "bias"), [(7, True), (9, False), ((7, 9), True)], ids=str)
def test_it_is_the_convolution(
    kernel: int | tuple[int, int],
    bias: bool,
    size: tuple[int, int],
    layout: torch.memory_format,
    gradients: Callable,
):
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    plain = depthwise(kernel, bias=bias, padding=padding).double().to(memory_format=layout)
    images = torch.rand(3, 16, *size, dtype=torch.float64).to(memory_format=layout)
    lowered = copy.deepcopy(plain)

    assert lower(lowered, images, batch_size=1) == 1

    assert type(lowered[0]) is WideDepthwiseConv2d
    pairs = zip(gradients(plain, images), gradients(lowered, images), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_the_gradient_of_its_gradient_is_that_of_the_convolution():
    plain = nn.Sequential(depthwise(padding=3).double(), nn.Softplus())
    images = torch.rand(2, 16, 3, 3, dtype=torch.float64)
    lowered = copy.deepcopy(plain)
    lower(lowered, images, batch_size=1)

    def steepness(model: nn.Module) -> list[Tensor]:
        x = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()]))

    assert all(
        torch.allclose(a, b) for a, b in zip(steepness(plain), steepness(lowered), strict=True)
    )


def test_its_gradient_in_bf16_passes_is_that_of_float32_but_for_rounding():
    plain = depthwise(padding=3)
    lowered = copy.deepcopy(plain)
    images = torch.rand(8, 16, 4, 4)
    lower(lowered, images, batch_size=8)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lowered(images)
        output.float().square().mean().backward()
    plain(images).square().mean().backward()

    assert output.dtype == torch.bfloat16
    assert lowered[0].weight.grad.dtype == torch.float32
    found, expected = lowered[0].weight.grad, plain[0].weight.grad
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"kernel": 5, "padding": 2}, 4),
        ({"padding": 3}, 9),
        ({"padding": 2}, 8),
        ({"padding": 3, "stride": 2}, 4),
        ({"padding": 3, "dilation": 2}, 9),
    ],
    ids=str,
)
def test_layers_of_other_forms_and_sizes_are_others_business(options: dict, side: int):
    model = depthwise(**options)

    lower(model, torch.rand(2, 16, side, side), batch_size=2)

    assert type(model[0]) is not WideDepthwiseConv2d


def test_only_depthwise_layers_become_wide_depthwise_ones():
    grouped = nn.Sequential(
        nn.Conv2d(16, 32, 7, padding=3, groups=16), nn.Conv2d(32, 16, 7, padding=3, groups=4)
    )

    lower(grouped, torch.rand(2, 16, 4, 4), batch_size=2)

    assert [type(layer) for layer in grouped] == [nn.Conv2d, nn.Conv2d]
