"""The examination: what is attacked, with which draws, and at which cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import EPS, World
from torch import Tensor, nn

from medspark.attacks.threat import ThreatModel
from medspark.defend.detect.adaptive import Target, adaptive_attacks
from medspark.defend.detect.bu import BayesianUncertainty
from medspark.defend.detect.config import AdaptiveSettings
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.features import Features
from medspark.defend.detect.kde import KernelDensity
from medspark.defend.detect.lid import LocalDimension
from medspark.defend.detect.mahalanobis import Mahalanobis
from medspark.defend.detect.pieces import keep_fitted, read_fitted
from medspark.defend.detect.rank_pca import RankPca

ALL = AdaptiveSettings(steps=3, searches=1)


def test_lid_kde_and_mahalanobis_of_all_layers_cost_one_pass_an_image(world: World) -> None:
    layers = world.extractor.tap.layers
    detectors = [
        cls.fit(layer, world.training)
        for layer in layers
        for cls in (LocalDimension, KernelDensity, Mahalanobis)
    ]
    passed: list[int] = []
    handle = world.network.register_forward_pre_hook(lambda _, given: passed.append(len(given[0])))
    try:
        features = world.extractor(world.test[0])
        scores = [each.score(features) for each in detectors]
    finally:
        handle.remove()

    assert len(layers) >= 3
    assert len(scores) == 3 * len(layers)
    assert sum(passed) <= 1.3 * len(world.test[0])


def test_every_attack_on_the_list_aims_at_the_detector_and_leading_at_components_only(world):
    images, labels, _ = world.test
    for target, expected in [
        (world.choice.targets[0], 4),
        (Target(RankPca.fit("uncentred", with_points(world)), 0.0, 1.0), 5),
    ]:
        extractor = world.examination().extractor(target.detector)
        made = dict(
            adaptive_attacks(
                target, extractor, images[:8], labels[:8],
                threat=ThreatModel(eps=EPS), settings=ALL,
            )
        )  # fmt: skip
        assert len(made) == expected
        assert ("leading" in made) == target.has_components


def with_points(world: World):
    """Return the training images with (k, p) drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def more(part: Features) -> Features:
        points = torch.rand(len(part.logits), 2, generator=generator)
        return replace(part, layers={**part.layers, "uncentred": points})

    parts = world.training
    return replace(
        parts,
        clean=more(parts.clean),
        noisy=more(parts.noisy),
        attacked=tuple(map(more, parts.attacked)),
    )


def test_the_attacker_of_a_detector_with_chance_does_not_know_its_draws(world: World) -> None:
    detector = BayesianUncertainty.fit("penultimate", world.training)
    target = Target(detector, 0.0, 1.0)
    extractor = world.examination().extractor(detector)
    images = world.test[0][:8]
    watch = target.watch(extractor)

    own = detector.score(extractor(images))

    seen = [watch(images, draw)[1] for draw in range(5)]
    assert all(not torch.equal(suspicion, own) for suspicion in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(own, detector.score(extractor(images)))


@pytest.fixture
def attacked(monkeypatch) -> list[nn.Module]:
    """The networks that attacks through a guard differentiate, in turn."""
    found: list[nn.Module] = []

    def spy(target, extractor, *given, **more):
        found.append(extractor.tap.model)
        return adaptive_attacks(target, extractor, *given, **more)

    monkeypatch.setattr("medspark.defend.detect.examine.adaptive_attacks", spy)
    return found


def norms_in(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_attacks_through_a_guard_run_on_a_frozen_copy_with_folded_batch_norms(
    world: World, attacked: list[nn.Module]
) -> None:
    world.examination().arrays([tuple(part[:4] for part in world.test)])

    assert norms_in(world.network) > 0
    assert len(attacked) == len(world.choice.targets)
    for network in attacked:
        assert norms_in(network) == 0
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_a_layer_that_folding_changes_is_attacked_in_the_network_itself(
    world: World, attacked: list[nn.Module]
) -> None:
    name = next(n for n, m in world.network.named_modules() if isinstance(m, nn.Conv2d))
    detector = Norm(name)
    examination = replace(
        world.examination(targets=(Target(detector, 0.0, 1.0),)), detectors=[detector]
    )

    examination.arrays([tuple(part[:4] for part in world.test)])

    assert attacked == [world.network]


@dataclass(frozen=True)
class Norm(Detector):
    """The size of a layer's features."""

    name = "norm"

    def score(self, features: Features) -> Tensor:
        return features.layers[self.layer].norm(dim=1)


def test_suspicion_is_the_standardised_score(world: World) -> None:
    target = next(t for t in world.choice.targets if t.detector.name == "kde")
    extractor = world.examination().extractor(target.detector)

    _, suspicion = target.watch(extractor)(world.test[0], 0)

    score = target.detector.score(extractor(world.test[0]))
    assert torch.allclose(suspicion, (score - target.mean) / target.deviation)


def test_components_are_examined_where_they_are_cheap_and_nan_elsewhere(world: World) -> None:
    points = RankPca.fit("uncentred", with_points(world))
    kde = next(t for t in world.choice.targets if t.detector.name == "kde")
    rank = Target(points, 0.0, 1.0)
    settings = AdaptiveSettings(attacks=("selective",), steps=2)
    examination = replace(
        world.examination(targets=(kde, rank)),
        detectors=[kde.detector, points],
        adaptive=settings,
    )
    images, labels, rows = world.test

    arrays = examination.arrays([(images[:8], labels[:8], rows[:8])])

    key = {target.key: f"{target.key}/selective@{round(255 * EPS):g}/scores"
           for target in (kde, rank)}  # fmt: skip
    assert np.isnan(arrays[key[kde.key]][:, 1]).all()
    assert not np.isnan(arrays[key[rank.key]]).any()
    assert not np.isnan(arrays["pgd@38/scores"]).any()
    assert "pgd@38/uncentred/answer" in arrays
    assert f"pgd@38/soft/{rank.key}" in arrays


def test_all_examined_images_are_inside_the_threat_model(world: World) -> None:
    outside = {n: v for n, v in world.examined.items() if n.endswith("/outside")}

    assert len(outside) == 2 + 2 * len(world.choice.targets)
    assert not any(values.any() for values in outside.values())


def test_an_examination_does_not_depend_on_the_batches(world: World) -> None:
    images, labels, rows = world.test
    examination = replace(world.examination(targets=world.choice.targets[:1]))
    batches = [(images[i : i + 10], labels[i : i + 10], rows[i : i + 10]) for i in (0, 10)]

    whole = examination.arrays([(images[:20], labels[:20], rows[:20])])
    parts = examination.arrays(batches)

    for name in ("clean/scores", "noisy/scores", "pgd@38/scores"):
        assert np.allclose(parts[name], whole[name], rtol=1e-3, atol=1e-3), name
    assert np.array_equal(parts["pgd@38/right"], whole["pgd@38/right"])


def test_workers_read_the_detectors_and_targets_that_were_fitted(world, tmp_path: Path) -> None:
    keep_fitted(tmp_path / "fitted", world.detectors, world.choice.targets)

    detectors, targets = read_fitted(tmp_path / "fitted")

    features = world.extractor(world.test[0])
    for one, other in zip(detectors, world.detectors, strict=True):
        assert torch.equal(one.score(features), other.score(features))
    assert [t.key for t in targets] == [t.key for t in world.choice.targets]
    assert [t.mean for t in targets] == [t.mean for t in world.choice.targets]
    assert all(any(t.detector is d for d in detectors) for t in targets)


def test_the_network_is_left_as_it_was(world: World) -> None:
    before = {key: value.clone() for key, value in world.network.state_dict().items()}

    world.examination().arrays([tuple(part[:4] for part in world.test)])

    assert all(torch.equal(v, before[k]) for k, v in world.network.state_dict().items())
    assert not world.network.training
