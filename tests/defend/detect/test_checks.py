"""The sanity law: detectors that mislead are planted, and a check flags each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from small_world import EPS, OBLIVIOUS, World
from torch import Tensor, nn

from medspark.defend.detect.adaptive import Target
from medspark.defend.detect.checks import by_chance, detector_flags
from medspark.defend.detect.choose import score_all
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import Features
from medspark.defend.detect.gather import gather
from medspark.defend.detect.kde import KernelDensity
from medspark.defend.detect.safetynet import SafetyNet
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.metrics import auroc


@dataclass(frozen=True)
class Planted(Detector):
    """A detector whose score is any function of the features."""

    name = "planted"

    by: object = None

    def score(self, features: Features) -> Tensor:
        return self.by(features)  # type: ignore[operator,no-any-return]


def triggered(world: World, planted: Detector, validated: float | None = None) -> set[str]:
    """Return the names of the flags of ``planted`` that trigger."""
    examination = replace(world.examination(targets=()), detectors=[planted])
    arrays = examination.arrays([world.test])
    calibration = score_all([planted], world.validation, "clean")
    if validated is None:
        validated = validation_area(world, planted)
    flags = detector_flags(
        arrays, [planted], [Target(planted, 0.0, 1.0)], OBLIVIOUS.trials(),
        calibration=calibration, validated=[validated],
    )  # fmt: skip
    return {flag.name.partition(": ")[2] for flag in flags if flag.triggered}


def validation_area(world: World, planted: Detector) -> float:
    scores = {c: score_all([planted], world.validation, c)[:, 0] for c in ("clean", "pgd@38")}
    truth = np.repeat([False, True], len(scores["clean"]))
    return auroc(truth, np.concatenate(list(scores.values()))) or 0.5


def test_honest_detectors_are_not_flagged(world: World) -> None:
    for target in world.choice.targets:
        assert triggered(world, target.detector) == set(), target.key


def test_a_detector_that_draws_by_chance_is_flagged_twice(world: World) -> None:
    generator = torch.Generator().manual_seed(1)
    planted = Planted("logits", lambda f: torch.rand(len(f.logits), generator=generator))

    assert triggered(world, planted) >= {"no_better_than_chance", "scores_not_repeatable"}


def test_a_repeatable_detector_without_knowledge_is_flagged(world: World) -> None:
    planted = Planted("logits", lambda f: (1e4 * f.logits.double().sum(1)).sin())

    assert "no_better_than_chance" in triggered(world, planted)


@pytest.mark.parametrize(("honest", "fooled"), [(45, 1), (16, 1), (8, 3), (4, 5), (6, 6)])
def test_chance_reaches_what_one_order_of_the_images_in_forty_reaches(honest, fooled) -> None:
    orders = list(combinations(range(honest + fooled), fooled))
    areas = [
        sum(place - number for number, place in enumerate(order)) / (honest * fooled)
        for order in orders
    ]

    usual = max(a for a in areas if np.mean([b >= a - 1e-12 for b in areas]) > 0.025)

    assert by_chance(honest, fooled) == pytest.approx(usual)
    assert by_chance(fooled, honest) == pytest.approx(usual)


def test_chance_never_reaches_more_than_1_and_the_normal_limit_for_many_images() -> None:
    assert by_chance(1, 1) == 1
    assert by_chance(64, 1) < 1  # a detector that ranks the one fooled image first may be good
    assert by_chance(500, 20) == pytest.approx(0.5 + 1.96 * (521 / 120_000) ** 0.5, abs=1e-3)
    assert by_chance(500, 300) == pytest.approx(0.5 + 1.96 * (801 / 1_800_000) ** 0.5)


@pytest.mark.parametrize(("counts", "flagged"), [([30, 30, 1], False), ([1, 1, 1], True)])
def test_an_attack_that_fools_one_image_does_not_decide_for_the_others(counts, flagged) -> None:
    trials = AttackSettings(attacks=("fgsm", "pgd", "pgd_margin"), eps=(EPS,)).trials()
    arrays = {"clean/right": np.ones(40, bool), "noisy/scores": np.linspace(0, 1, 40)[:, None]}
    arrays |= {f"{name}/scores": arrays["noisy/scores"] for name in ("clean", "again", "same_file")}
    for trial, count in zip(trials, counts, strict=True):
        arrays[f"{trial.key}/right"] = np.arange(40) >= count
        arrays[f"{trial.key}/scores"] = np.full((40, 1), 0.88)  # an AUROC of about .88
    planted = Planted("logits")

    flags = detector_flags(
        arrays, [planted], [Target(planted, 0.0, 1.0)], trials,
        calibration=arrays["clean/scores"], validated=[0.9],
    )  # fmt: skip

    assert {f.name for f in flags if f.triggered} == (
        {"planted:logits: no_better_than_chance"} if flagged else set()
    )
    assert ("1 to 30 such images" in flags[0].sentence) != flagged


class Grain(nn.Module):
    """Shows how far pixels are from whole grey levels, and passes the image on."""

    def forward(self, images: Tensor) -> Tensor:
        levels = images * 255
        return (levels - levels.round()).abs()


class Grained(nn.Module):
    """A network with one more layer, which no logit depends on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.grain, self.network = Grain(), network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images) + 0 * self.grain(images).mean()
        return logits


def test_a_detector_that_knows_attacks_by_their_fractions_of_a_level_is_flagged(world) -> None:
    images = world.test[0]
    planted = Planted("grain", lambda f: f.layers["grain"].sum(1))
    attacked = images + 0.3 / 255
    features = [Features(torch.zeros(64, 2), {"grain": Grain()(x).mean((2, 3))})
                for x in (images, attacked)]  # fmt: skip
    perfect = torch.cat([planted.score(f) for f in features]).numpy()
    assert auroc(np.repeat([False, True], 64), perfect) == 1.0  # on images that were not rounded

    grained = replace(world.examination(targets=()), model=Grained(world.network))
    arrays = replace(grained, detectors=[planted]).arrays([world.test])
    flags = detector_flags(
        arrays, [planted], [Target(planted, 0.0, 1.0)], OBLIVIOUS.trials(),
        calibration=arrays["clean/scores"], validated=[1.0],
    )  # fmt: skip

    found = {flag.name for flag in flags if flag.triggered}
    assert "planted:grain: reads_quantisation" in found


def test_all_images_that_detectors_see_are_in_whole_levels(world: World) -> None:
    planted = Planted("grain", lambda f: f.layers["grain"].sum(1))
    target = Target(planted, 0.0, 1.0)
    model, few = Grained(world.network), tuple(part[:16] for part in world.test)
    examination = replace(world.examination(targets=(target,)), detectors=[planted], model=model)

    arrays = examination.arrays([few])
    features = gather(Extractor.on(model, ("grain",), ""), [few], OBLIVIOUS, bits=8)

    scores = [v for n, v in arrays.items() if n.endswith("/scores") and "same_file" not in n]
    assert len(scores) == 2 + 1 + 2 + 2  # clean twice, noisy, oblivious, through the target
    grains = [values for name, values in features.items() if name.endswith("/grain")]
    assert len(grains) == 2 + 2
    assert max(values.max() for values in [*scores, *grains]) < 1e-3


def fitted_on_test(world: World) -> Sequence[Detector]:
    """Return a density and a machine that were fitted on the test images."""
    test = gather(world.extractor, [world.test], OBLIVIOUS, bits=8)
    parts = {
        name: Features(torch.from_numpy(test[f"{name}/logits"]),
                       {"logits": torch.from_numpy(test[f"{name}/logits"])})
        for name in ("clean", "noisy", "pgd@38")
    }  # fmt: skip
    penultimate = {
        name: Features(part.logits, {"penultimate": torch.from_numpy(test[f"{name}/penultimate"])})
        for name, part in parts.items()
    }
    seen = replace(
        world.training,
        reference=penultimate["clean"],
        labels=penultimate["clean"].predicted,
        clean=penultimate["clean"],
        noisy=penultimate["noisy"],
        attacked=(penultimate["pgd@38"],),
    )
    density = KernelDensity.fit("penultimate", seen)
    return replace(density, bandwidth=density.bandwidth / 4), SafetyNet.fit("penultimate", seen)


@pytest.mark.parametrize("number", [0, 1], ids=["density", "machine"])
def test_a_detector_that_was_fitted_on_test_images_is_flagged(world: World, number: int) -> None:
    planted = fitted_on_test(world)[number]

    assert "fitted_on_test_images" in triggered(world, planted)
