"""The training step of a denoiser: what it attacks, what it compares, and what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded_networks import build_guarded
from ranks import batch_for
from tiny_network import ALONE, build_sample, engine_for
from torch import nn

from medspark.attacks.fgsm import fgsm
from medspark.defend.denoise.config import DenoiseConfig
from medspark.defend.denoise.rule import denoising_rule, turn_of
from medspark.models.guarded import GuardedClassifier
from medspark.train.config import AdversarialConfig
from medspark.train.learner import Learner, Sample, StepStats
from medspark.train.objective import CrossEntropy

EPS = 8 / 255


@pytest.fixture
def network() -> GuardedClassifier:
    network = build_guarded(side=12).train()
    network.freeze_classifier()
    return network


def step(network: nn.Module, sample: Sample | None = None, **settings: Any) -> StepStats:
    config = DenoiseConfig.model_validate({"attacks": ("fgsm",)} | settings)
    learner = Learner(network, CrossEntropy(), AdversarialConfig(inner_steps=2))
    return denoising_rule(config, eps=EPS)(learner, sample or images())


def images(**chosen: Any) -> Sample:
    return build_sample(6, **{"dtype": torch.float32} | chosen)


def test_only_denoiser_and_embedding_get_a_gradient_and_all_of_it(network) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}

    step(network)

    graded = {n for n, p in network.named_parameters() if p.grad is not None}
    assert graded == {n for n, _ in network.named_parameters() if n[:4] in ("deno", "cont")}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_attacker_of_a_step_does_not_know_the_denoiser(network) -> None:
    sample = images()

    attacked = step(network, sample).attacked

    expected = fgsm(network.classify, sample.images, sample.labels, threat=sample.threat)  # type: ignore[arg-type]
    assert torch.equal(attacked, expected)


def test_with_through_half_of_the_steps_attack_through_the_denoiser(network) -> None:
    config = DenoiseConfig(attacks=("fgsm", "noise"), through=True)
    turns = [turn_of(config, key) for key in range(8)]

    assert sorted(turns) == sorted([(n, t) for n in ("fgsm", "noise") for t in (False, True)] * 2)
    sample = images()
    key = next(k for k, turn in enumerate(turns) if turn == ("fgsm", True))
    through = step(network, Sample(**_with(sample, key=key)), **config.model_dump()).attacked
    assert torch.equal(through, fgsm(network, sample.images, sample.labels, threat=sample.threat))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "noise"])
def test_changed_images_stay_inside_the_threat_model(name: str, network) -> None:
    sample = images()

    attacked = step(network, sample, attacks=(name,)).attacked

    assert attacked is not None
    assert sample.threat.holds(attacked, sample.images).all()
    assert not torch.equal(attacked, sample.images)


@pytest.mark.parametrize("guide", ["features", "logits"])
def test_an_identity_on_unchanged_images_costs_nothing_but_contrast(guide: str) -> None:
    network = build_guarded(side=12, trained=False)
    network.freeze_classifier()
    sample = images()
    sample = Sample(**_with(sample, threat=sample.threat.model_copy(update={"eps": 0.0})))

    weighted, alone = (
        step(network, sample, guide=guide, contrast=0.5, **more).loss
        for more in ({}, {"reconstruct": 0.0, "consistency": 0.0})
    )

    assert torch.allclose(weighted, alone, atol=1e-5)
    assert alone > 0


@pytest.mark.parametrize("part", ["reconstruct", "consistency", "contrast"])
def test_each_loss_has_its_weight(part: str, network) -> None:
    others = dict.fromkeys(("reconstruct", "consistency"), 0.0) | {"contrast": 1e-9}

    once, twice = (step(network, **others | {part: w}).loss for w in (1.0, 2.0))

    assert float(twice) == pytest.approx(2 * float(once), rel=1e-4)
    assert once > 0


def test_the_weight_of_a_piece_multiplies_its_loss(network) -> None:
    half, whole = (step(network, images(weight=w)).loss for w in (0.5, 1.0))

    assert float(half) == pytest.approx(float(whole) / 2)


def test_steps_bring_the_denoised_images_nearer_to_the_clean_ones() -> None:
    network = build_guarded(side=12, trained=False)
    network.freeze_classifier()
    # On images of one grey level, the attack is all that there is to see.
    flat = images()
    flat = Sample(**_with(flat, images=torch.full_like(flat.images, 0.4)))
    config = DenoiseConfig(attacks=("fgsm",), reconstruct=1.0, consistency=0.0, contrast=1e-6)
    rule = denoising_rule(config, eps=EPS)
    engine = engine_for(
        network, steps=40, step_rule=lambda learner, _: rule(learner, flat), lr=1e-2
    )
    losses = [engine.step(batch_for(ALONE, size=6), n).figures[0].item() for n in range(40)]

    assert losses[0] == pytest.approx(0.5, abs=0.01)  # half of the images are changed by eps
    assert losses[-1] < 0.4


def _with(sample: Sample, **changes: Any) -> dict[str, Any]:
    names = ("images", "labels", "rows", "weight", "threat", "key")
    return {name: getattr(sample, name) for name in names} | changes
