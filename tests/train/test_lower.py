"""A convolution as a matrix product is the same convolution, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.train.lower import Float32Conv2d, MatrixConv2d, PaddedConv2d, lower, same_weights


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    x = images.clone().requires_grad_(True)
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    return [output, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


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
    kernel: int, stride: int, padding: int, bias: bool, layout: torch.memory_format
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


def test_two_passes_over_the_same_weights_cast_them_once_and_the_next_step_anew():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(64, 96, 1))
    images = torch.rand(2, 64, 2, 2)
    lowered = copy.deepcopy(plain)
    lower(lowered, images, batch_size=1)
    casts = []
    lowered[0]._cast = lambda dtype: casts.append(dtype) or MatrixConv2d._cast(lowered[0], dtype)
    for model in (plain, lowered):
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimiser.zero_grad()
            with same_weights("cpu"):
                for _ in range(2):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        output = model(images)
                    output.float().square().sum().backward()
            optimiser.step()

    assert casts == 3 * [torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(plain(images), lowered(images), rtol=0.02, atol=0.02)


def test_the_compiler_takes_it_whole():
    torch.manual_seed(0)
    lowered = nn.Sequential(nn.Conv2d(64, 96, 1), nn.ReLU(inplace=True))
    images = torch.rand(2, 64, 2, 2)
    lower(lowered, images, batch_size=1)
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)

    with same_weights("cpu"):
        assert torch.allclose(compiled(images), lowered(images), atol=1e-6)


def test_torch_casts_a_weight_once_for_all_passes_over_the_same_weights():
    conv, images = nn.Conv2d(3, 5, 3), torch.rand(2, 3, 8, 8)

    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
        same_weights("cpu"),
    ):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                conv(images)

    casts = [e for e in seen.key_averages(group_by_input_shape=True) if e.key == "aten::_to_copy"]
    assert [e.count for e in casts if e.input_shapes[0] == list(conv.weight.shape)] == [1]


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


@pytest.mark.parametrize(("stride", "kind"), [(1, PaddedConv2d), (2, Float32Conv2d)])
def test_depthwise_layers_are_lowered_to_the_same_convolution(stride: int, kind: type[nn.Conv2d]):
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
