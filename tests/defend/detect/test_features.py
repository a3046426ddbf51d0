"""All layers are read in one pass, whatever follows them in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medspark.defend.detect.features import Tap, chosen_layers, find_layers
from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

IMAGES = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str = "test_resnet") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(ModelConfig(name=name), num_classes=3, channels=1).eval()


def test_all_layers_cost_one_pass_an_image():
    model, passed = network(), []
    model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    known = find_layers(model, IMAGES[:1])
    passed.clear()

    features = Tap(model, known.names, known.head)(IMAGES)

    assert sum(passed) == len(IMAGES)
    assert set(features.layers) == set(known.names)


def test_a_feature_is_the_mean_activation_of_the_layer_and_logits_are_unchanged():
    model = network()
    known = find_layers(model, IMAGES[:1])
    seen = {}
    for name in known.stages:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, out.clone())
        )

    with torch.no_grad():
        features = Tap(model, known.names, known.head)(IMAGES)
        logits = model(IMAGES)

    assert torch.equal(features.logits, logits)
    for name, output in seen.items():
        assert torch.equal(features.layers[name], output.mean((2, 3)))
    head = model.get_submodule(known.head)
    assert torch.allclose(head(features.layers["penultimate"]), logits, atol=1e-6)


def test_the_layers_are_the_last_of_each_resolution_and_the_head():
    known = find_layers(network("resnet10t"), IMAGES[:1])

    assert known.names == (
        "backbone.act1", "backbone.layer1", "backbone.layer2", "backbone.layer3",
        "penultimate", "logits",
    )  # fmt: skip
    assert known.head == "backbone.fc"


def test_a_layer_that_is_overwritten_in_place_is_read_before():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3600, 2)
    )
    model.eval()
    features = Tap(model, ("0",), "3")(IMAGES)

    assert torch.allclose(features.layers["0"], model[0](IMAGES).mean((2, 3)))


def test_no_hook_stays_behind_and_gradients_reach_the_images():
    model = network()
    known = find_layers(model, IMAGES[:1])
    images = IMAGES.clone().requires_grad_(True)

    features = Tap(model, known.names, known.head)(images)
    sum(value.sum() for value in features.layers.values()).backward()

    assert images.grad is not None
    assert (images.grad != 0).any()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_the_network_lacks_is_named_beside_those_that_it_has():
    model = network()
    known = find_layers(model, IMAGES[:1])

    assert chosen_layers(("auto",), known, model) == known.names
    assert chosen_layers(("logits", "backbone.layer2"), known, model) == (
        "logits",
        "backbone.layer2",
    )
    with pytest.raises(UsageError, match=r"no layer 'layer9'; there are backbone\.\S+, "):
        chosen_layers(("layer9",), known, model)
