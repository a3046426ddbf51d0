"""Attacked and noisy images are in whole levels, as files are, and inside the threat model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.threat import ThreatModel, norms
from medspark.defend.detect.stored import as_stored, noise_like, within_a_level


def images(bits: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = 2**bits - 1
    drawn = low + (high - low) * torch.rand(8, 1, 16, 16, generator=generator)
    return (drawn * levels).round() / levels


def whole(found: Tensor, bits: int) -> bool:
    levels = found.double() * (2**bits - 1)
    return bool((levels - levels.round()).abs().max() < (1e-3 if bits == 8 else 0.02))


@given(st.sampled_from(["linf", "l2"]), st.sampled_from([0.4, 1, 1.5, 2, 8]), st.integers(0, 99))
def test_stored_images_are_in_whole_levels_and_inside_the_threat_model(norm, levels, seed) -> None:
    clean, threat = images(8), ThreatModel(norm=norm, eps=levels / 255)
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed))
    attacked = threat.project(clean + 3 * threat.eps * (noise - 0.5), clean)

    found = as_stored(attacked, clean, threat=threat, bits=8)

    assert whole(found, 8)
    assert threat.holds(found, clean).all()


def test_what_is_whole_already_stays_as_it_is() -> None:
    clean, threat = images(8), ThreatModel(eps=2 / 255)
    attacked = threat.project(clean + threat.eps * (clean - 0.5).sign(), clean)

    assert torch.equal(as_stored(attacked, clean, threat=threat, bits=8).mul(255).round(),
                       attacked.mul(255).round())  # fmt: skip


@pytest.mark.parametrize("bits", [8, 16])
def test_noise_has_the_size_of_the_attack_and_is_in_whole_levels(bits: int) -> None:
    clean = images(bits, low=0.2, high=0.8)
    rng = KeyedRandom.for_whole(clean)
    attacked = clean + 8 / 255 * torch.where(clean > 0.5, 1, -1)

    noisy = noise_like(attacked, clean, rng, bits=bits)

    assert whole(noisy, bits)
    sizes = [norms(found - clean).flatten() for found in (noisy, attacked)]
    assert torch.allclose(*sizes, rtol=0.02)
    assert len(torch.unique((noisy - clean).mul(255).round())) > 10


def test_an_image_within_a_level_is_the_same_file() -> None:
    clean = images(8)
    shifted = within_a_level(clean, KeyedRandom.for_whole(clean), bits=8)

    assert torch.equal((shifted * 255).round(), (clean * 255).round())
    assert not torch.equal(shifted, clean)
