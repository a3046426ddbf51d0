"""A detector that also sees how the features of an image change when the image is smoothed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_features import drawn, training
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from medspark.defend.detect.deep import DeepFeatures, SmoothedFeatures
from medspark.defend.detect.detector import ALL_LAYERS
from medspark.defend.detect.extract import Extractor, smoothings
from medspark.defend.detect.features import LOGITS, SMOOTHED, Features, Tap, find_layers
from medspark.defend.detect.registry import grid, layers_of
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

IMAGES = torch.rand(4, 3, 9, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(ModelConfig(name="test_resnet"), num_classes=3, channels=3).eval()


def test_a_smoothed_pixel_is_the_binomial_mean_or_the_median_of_its_neighbourhood():
    mean, median = smoothings(IMAGES)

    weights = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    around = IMAGES[..., 2:5, 4:7]
    assert torch.allclose(mean[..., 3, 5], (around * weights).sum((2, 3)))
    assert torch.equal(median[..., 3, 5], around.flatten(2).sort().values[..., 4])
    assert mean.shape == median.shape == IMAGES.shape
    grey = torch.full((1, 1, 2, 2), 0.3)
    assert all(torch.allclose(each, grey) for each in smoothings(grey))


def test_the_change_of_all_layers_costs_two_passes_more():
    model, passed = network(), []
    known = find_layers(model, IMAGES[:1])
    model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    found = Extractor.on(model, (*known.names, SMOOTHED), known.head)(IMAGES)

    assert sum(passed) == 3 * len(IMAGES)
    tap = Tap(model, known.names, known.head)
    with torch.no_grad():
        before, after = tap(IMAGES).layers, [tap(each).layers for each in smoothings(IMAGES)]
    names = [*sorted(set(known.names) - {LOGITS}), LOGITS]
    changes = [before[name] - each[name] for each in after for name in names]
    expected = torch.cat(changes, dim=1)
    assert torch.allclose(found.layers[SMOOTHED], expected, atol=1e-6)


def test_the_change_is_the_same_in_any_order_of_layers_and_without_the_logits_among_them():
    model = network()
    known = find_layers(model, IMAGES[:1])
    some = [name for name in known.names if name != LOGITS]

    found = [
        Extractor.on(model, names, known.head)(IMAGES).layers[SMOOTHED]
        for names in ([*some, SMOOTHED], [SMOOTHED, LOGITS, *reversed(some)])
    ]

    assert len(some) > 1
    assert torch.equal(*found)


def test_an_attacker_has_the_gradient_of_all_passes():
    model = network()
    known = find_layers(model, IMAGES[:1])
    look = Extractor.on(model, (*known.names, SMOOTHED), known.head)
    images = IMAGES.double().requires_grad_(True)
    model.double()

    def score(x: Tensor) -> Tensor:
        return look.soft(x, 0).layers[SMOOTHED].square().sum()

    (gradient,) = torch.autograd.grad(score(images), images)
    step = torch.zeros_like(IMAGES, dtype=torch.float64)
    step[1, 2, 4, 6] = 1e-6
    with torch.no_grad():
        slope = (score(IMAGES.double() + step) - score(IMAGES.double() - step)) / 2e-6
    assert float(gradient[1, 2, 4, 6]) == pytest.approx(float(slope), rel=1e-4)


def test_it_reads_the_change_which_the_detector_of_one_pass_does_not():
    layers = ("a", SMOOTHED)
    known = replace(
        training(layers=layers), attacked=(_shifted_change(drawn(60, 3, layers=layers)),)
    )
    both = SmoothedFeatures.fit(ALL_LAYERS, known)
    one = DeepFeatures.fit(ALL_LAYERS, known)
    clean = drawn(90, 21, layers=layers)
    attacked = _shifted_change(drawn(90, 22, layers=layers))

    def area(detector: DeepFeatures) -> float:
        scores = torch.cat([detector.score(clean), detector.score(attacked)])
        return float(roc_auc_score([0] * 90 + [1] * 90, scores.numpy()))

    assert (both.layers, one.layers) == (layers, ("a",))
    assert area(both) > 0.95
    assert area(one) < 0.7


def test_its_grid_asks_for_the_change():
    pairs = grid(["deep", "smoothed"], ["stage", "logits"])

    assert pairs == [("deep", ALL_LAYERS), ("smoothed", ALL_LAYERS)]
    assert layers_of(pairs) == (SMOOTHED,)


def _shifted_change(features: Features) -> Features:
    return replace(features, layers={**features.layers, SMOOTHED: features.layers[SMOOTHED] + 2.0})
