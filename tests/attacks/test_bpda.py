"""Attacks on a network behind a denoiser, with and without the denoiser's gradient."""

from __future__ import annotations

import pytest
import torch
from guarded_networks import build_guarded
from torch import Tensor, nn

from medspark.attacks.bpda import bpda_pgd, is_denoised, unguarded_pgd
from medspark.attacks.config import Effort
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import attacks_by_name
from medspark.attacks.threat import ThreatModel

THREAT = ThreatModel(eps=51 / 255)


class Behind(nn.Module):
    """A network behind a denoiser."""

    def __init__(self, network: nn.Module, denoise) -> None:
        super().__init__()
        self.network, self.denoiser = network, denoise

    def classify(self, images: Tensor) -> Tensor:
        return self.network(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.denoiser(images))


def levels(images: Tensor) -> Tensor:
    """Round to 17 levels, which digits have anyway: no gradient, and little change."""
    return (images * 16).round() / 16


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(correct(network(images), labels).float().mean())


def test_bpda_breaks_a_denoiser_that_shatters_gradients_where_pgd_does_nothing(
    plain_network, digits
) -> None:
    network, images, labels = Behind(plain_network, levels), digits.test_images, digits.test_labels

    follow = pgd(network, images, labels, threat=THREAT, steps=10)
    approximate = bpda_pgd(network, images, labels, threat=THREAT, steps=10)

    assert accuracy(network, follow, labels) == accuracy(network, images, labels) > 0.95
    assert accuracy(network, approximate, labels) < 0.4
    assert THREAT.holds(approximate, images).all()


@pytest.mark.parametrize("attack", [bpda_pgd, unguarded_pgd])
def test_without_a_change_by_the_denoiser_they_are_pgd(attack, plain_network, digits) -> None:
    network, images, labels = Behind(plain_network, nn.Identity()), *_few(digits)

    found = attack(network, images, labels, threat=THREAT, steps=3)

    assert torch.equal(found, pgd(plain_network, images, labels, threat=THREAT, steps=3))


def test_an_attacker_who_does_not_know_the_denoiser_gets_the_same_images_with_any(
    plain_network, digits
) -> None:
    images, labels = _few(digits)
    first, second = (
        unguarded_pgd(Behind(plain_network, d), images, labels, threat=THREAT, steps=3)
        for d in (levels, torch.zeros_like)
    )

    assert torch.equal(first, second)


def test_bpda_attacks_what_the_whole_network_answers(plain_network, digits) -> None:
    images, labels = _few(digits)
    network = Behind(plain_network, lambda x: 1 - x)

    whole, alone = (
        attack(network, images, labels, threat=THREAT, steps=3)
        for attack in (bpda_pgd, unguarded_pgd)
    )

    assert not torch.equal(whole, alone)


@pytest.mark.parametrize("name", ["bpda_pgd", "unguarded_pgd"])
def test_a_guarded_network_is_attacked_by_name_and_keeps_its_gradients_clean(name: str) -> None:
    network = build_guarded()
    assert is_denoised(network)
    assert not is_denoised(network.backbone)
    images, labels = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 0, 1])

    attack = attacks_by_name([name], Effort(steps=2))[name]
    found = attack(network, images, labels, THREAT, KeyedRandom(0, torch.arange(4)))

    assert THREAT.holds(found, images).all()
    assert not torch.equal(found, images)
    assert all(p.grad is None for p in network.parameters())


def _few(digits) -> tuple[Tensor, Tensor]:
    return digits.test_images[:20], digits.test_labels[:20]
