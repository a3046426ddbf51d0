"""A dense block over one buffer is timm's, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medspark.models.backbones import build
from medspark.models.classifier import Classifier, batch_norms, freeze_batch_norm
from medspark.models.config import ModelConfig
from medspark.models.kernels.dense_block import BufferedDenseBlock, can_be_buffered
from medspark.models.kernels.fold import fold
from medspark.models.kernels.lower import lower
from medspark.models.torchvision_ops import declare_missing_operators
from medspark.train.dual_norm import DualNorm

Both = Callable[..., list[Tensor]]


def timms_block(*, layers: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """Return a block as folding leaves it: the second batch norms are in the convolutions."""
    declare_missing_operators()
    from timm.models.densenet import DenseBlock

    torch.manual_seed(0)
    block = DenseBlock(layers, num_input_features=8, bn_size=3, growth_rate=4)
    for layer in block.values():
        norm = layer.norm1.eval()
        nn.init.uniform_(norm.weight, -1.0, 2.0)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        layer.conv1 = nn.Conv2d(layer.conv1.in_channels, 12, 1)
        layer.norm2 = nn.ReLU(inplace=True)
    return block.to(dtype=dtype, memory_format=torch.channels_last)


def features(side: int = 4, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the input of the block."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 8, side, side, dtype=dtype, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest relative distance of tensors that should be the same."""
    return max(
        float((a - b).norm() / a.norm().clamp_min(1e-9))
        for a, b in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("side", [1, 2, 50])
def test_outputs_and_all_gradients_are_timms(side: int, gradients: Both):
    plain = timms_block(layers=11)
    buffered = BufferedDenseBlock(copy.deepcopy(plain))

    assert apart(gradients(plain, features(side)), gradients(buffered, features(side))) < 1e-12


@pytest.mark.parametrize(
    ("low", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_lower_precision_differs_by_rounding(low: torch.dtype, rounding: float, gradients: Both):
    exact = timms_block()
    images = features()
    buffered = BufferedDenseBlock(copy.deepcopy(exact).float())

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low == torch.bfloat16):
        found = gradients(buffered, images.float())

    assert found[0].dtype == low
    assert apart(gradients(exact, images), [tensor.double() for tensor in found]) < rounding


def test_a_whole_densenet_has_the_gradients_it_had(gradients: Both):
    images = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    model = lively(build(ModelConfig(name="densenet121"), num_classes=2, channels=1)).double()
    plain = fold(model.to(memory_format=torch.channels_last), images).trained
    lowered = copy.deepcopy(plain)
    lower(lowered, images, batch_size=2)

    assert sum(type(m) is BufferedDenseBlock for m in lowered.modules()) == 4
    assert not any(norm.training for norm in batch_norms(lowered))
    assert list(plain.state_dict()) == list(lowered.state_dict())
    assert apart(gradients(plain, images), gradients(lowered, images)) < 1e-10


def lively(model: Classifier) -> Classifier:
    """Freeze the batch norms of ``model`` at random statistics and scales."""
    torch.manual_seed(0)
    for layer in batch_norms(model):
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 2.0)
        layer.weight.data.uniform_(-1.0, 2.0)
    freeze_batch_norm(model)
    return model.train()


def test_the_gradient_of_its_gradient_is_timms():
    plain = timms_block()
    buffered = BufferedDenseBlock(copy.deepcopy(plain))

    def steepness(block: nn.Module) -> list[Tensor]:
        x = features().requires_grad_(True)
        (slope,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [slope.detach(), x.grad, *(p.grad for p in block.parameters())]

    assert apart(steepness(plain), steepness(buffered)) < 1e-12


def test_the_gradient_of_its_gradient_takes_passes_in_bf16():
    buffered = BufferedDenseBlock(timms_block(dtype=torch.float32))
    x = features(dtype=torch.float32).requires_grad_(True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = buffered(x)
    (slope,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
    slope.square().sum().backward()

    assert all(p.grad.dtype == torch.float32 for p in buffered.parameters())


def test_gradients_lie_in_memory_like_their_weights_and_features():
    buffered = BufferedDenseBlock(timms_block())
    x = features().requires_grad_(True)
    output = buffered(x)
    given: list[tuple[Tensor, Tensor]] = []
    for tensor in (x, *buffered.parameters()):
        # The dtype that arrives, not the one that torch would cast to.
        tensor.register_hook(lambda gradient, t=tensor: given.append((t, gradient)))
    output.sum().backward()

    def lies(tensor: Tensor) -> list[int]:
        return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]

    assert output.is_contiguous(memory_format=torch.channels_last)
    assert len(given) == 1 + len(list(buffered.parameters()))
    assert all(lies(tensor) == lies(gradient) for tensor, gradient in given)


def test_the_gradient_that_comes_in_is_left_as_it_was():
    buffered, x = BufferedDenseBlock(timms_block()), features().requires_grad_(True)
    output = buffered(x)
    gradient = torch.ones_like(output)

    output.backward(gradient)

    assert (gradient == 1).all()


def test_moving_batch_norm_moves_as_in_timms_block(gradients: Both):
    plain = timms_block()
    buffered = BufferedDenseBlock(copy.deepcopy(plain))
    plain.train()
    buffered.train()

    assert apart(gradients(plain, features()), gradients(buffered, features())) < 1e-12
    pairs = zip(plain.buffers(), buffered.buffers(), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_a_pass_without_gradients_keeps_nothing():
    buffered = BufferedDenseBlock(timms_block())

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        buffered(features())

    assert not any(event.key == "_Block" for event in seen.key_averages())


def test_the_compiler_takes_it_whole():
    buffered = BufferedDenseBlock(timms_block())
    compiled = torch.compile(buffered, backend="aot_eager", fullgraph=True)

    assert torch.allclose(compiled(features()), buffered(features()))


@pytest.mark.parametrize("side", [2, 50])
def test_weights_that_do_not_learn_get_no_gradient_and_cost_none(side: int):
    plain = timms_block()
    buffered = BufferedDenseBlock(copy.deepcopy(plain))
    slopes = []
    for block in (plain, buffered):
        block.denselayer1.requires_grad_(False)
        block.denselayer3.requires_grad_(False)
        x = features(side).requires_grad_(True)
        output = block(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            output.square().sum().backward()
        slopes.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])

    assert apart(*slopes) < 1e-12
    assert [p.grad is not None for p in plain.parameters()] == [
        p.grad is not None for p in buffered.parameters()
    ]
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["aten::native_batch_norm_backward"] == 1


def test_the_gradient_of_its_gradient_is_to_be_had_of_weights_that_do_not_learn():
    buffered = BufferedDenseBlock(timms_block()).requires_grad_(False)
    x = features().requires_grad_(True)

    (slope,) = torch.autograd.grad(buffered(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()

    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change",
    ["dropout", "activation", "batch norm", "doubled batch norm", "other width", "another block"],
)
def test_other_blocks_are_left_alone(change: str):
    block = timms_block()
    assert can_be_buffered(block)

    if change == "dropout":
        block.denselayer2.drop_rate = 0.1
    if change == "activation":
        block.denselayer2.norm1.act = nn.GELU()
    if change == "batch norm":
        block.denselayer2.norm2 = nn.BatchNorm2d(12)
    if change == "doubled batch norm":
        block.denselayer2.norm1 = DualNorm(block.denselayer2.norm1)
    if change == "other width":
        block.denselayer2.conv2 = nn.Conv2d(12, 3, 3, padding=1, bias=False)
    if change == "another block":
        block.__class__ = type("DenseBlock", (type(block),), {"__module__": "elsewhere"})

    assert not can_be_buffered(block)
