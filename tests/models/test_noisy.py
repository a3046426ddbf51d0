"""Layers with noisy weights: the equation, its gradients, and the same network without noise."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.models.masks import apply_masks, magnitude_masks, prunable
from medspark.models.noisy import add_noise, noisy_layers, plain_layers, silent


class Odd(nn.Conv2d):
    """A convolution that computes something of its own."""


IMAGES = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()


def layer(kind: str = "conv", scale: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(2, 3, 2))
    add_noise(made, scale)
    return made.to(memory_format=torch.channels_last) if kind == "channels last" else made


def test_without_noise_it_is_the_plain_network_bit_for_bit() -> None:
    plain = network()
    noisy = copy.deepcopy(plain)
    names = add_noise(noisy, 0.25)

    assert len(names) == len(prunable(plain)) == len(noisy_layers(noisy))
    with silent(noisy):
        assert torch.equal(noisy(IMAGES), plain(IMAGES))
    assert not torch.equal(noisy(IMAGES), plain(IMAGES))
    plain_layers(noisy)
    assert torch.equal(noisy(IMAGES), plain(IMAGES))
    assert noisy.state_dict().keys() == plain.state_dict().keys()


def test_layers_with_few_inputs_have_no_noise_and_learn_none() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 1))
    plain = copy.deepcopy(model)
    add_noise(model, 0.5)

    model(torch.rand(2, 8, 6, 6)).sum().backward()

    depthwise, wide, narrow = model
    assert (wide.noise == 0.5).all()
    assert wide.noise.grad is not None
    for layer, before in ((depthwise, plain[0]), (narrow, plain[2])):
        assert (layer.noise == 0).all()
        assert layer.noise.grad is None
        assert torch.equal(layer.drawn(), before.weight)


@pytest.mark.parametrize("kind", ["conv", "channels last", "linear"])
def test_a_pass_adds_a_normal_draw_times_scale_and_deviation_of_the_layer(kind: str) -> None:
    made = layer(kind)[0]
    scales = torch.tensor([0.1, 0.5, 2.0])
    with torch.no_grad():
        made.noise.copy_(scales)

    draws = torch.stack([made.drawn().detach() - made.weight for _ in range(4000)])

    assert made.drawn().stride() == made.weight.stride()
    spread = draws.flatten(2).std(dim=(0, 2)) / made.weight.std()
    assert torch.allclose(spread, scales, rtol=0.05)
    assert draws.mean(0).abs().max() < 0.1 * made.weight.std() * scales.max()


@given(st.integers(0, 99))
def test_the_gradient_of_a_scale_is_that_of_its_channels_weights_times_their_draws(seed) -> None:
    made = layer()[0]
    images = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    draw = (made.drawn() - made.weight).detach() / 0.5
    torch.manual_seed(seed)

    made(images).square().sum().backward()

    expected = (made.weight.grad * draw).sum(dim=(1, 2, 3))
    assert torch.allclose(made.noise.grad, expected, rtol=1e-3, atol=1e-4)


def test_every_pass_draws_anew_and_a_seed_repeats_it() -> None:
    made, images = layer(), torch.rand(1, 2, 4, 4)
    torch.manual_seed(3)
    first, second = made(images), made(images)
    torch.manual_seed(3)

    assert not torch.equal(first, second)
    assert torch.equal(made(images), first)


@given(st.floats(0, 0.95))
def test_a_pruned_weight_gets_no_noise(sparsity: float) -> None:
    made = layer(scale=1.0)
    weights = prunable(made)
    masks = magnitude_masks(weights, sparsity)
    apply_masks(weights, masks)

    assert torch.equal(made[0].drawn() != 0, masks["0.weight"])


def test_a_layer_that_computes_something_of_its_own_is_named_and_nothing_is_changed() -> None:
    made = nn.Sequential(nn.Conv2d(1, 2, 3), Odd(2, 2, 3))

    with pytest.raises(TypeError, match="layer 1 is a Odd"):
        add_noise(made, 0.25)
    assert type(made[0]) is nn.Conv2d
