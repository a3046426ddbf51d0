"""Networks with noisy weights are judged with noise, without it and across, all of it together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.losses import correct
from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.noise_result import NoiseResult, noise_lines
from medspark.evaluate.noisy import judge_noise, judged_rows
from medspark.models.noisy import add_noise

COUNT = 24
IMAGES = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SHARES = st.floats(0, 1)
FIGURES = (
    "clean", "pgd", "eot", "transfer", "worst",
    "silent_clean", "silent_pgd", "silent_transfer", "silent_worst",
)  # fmt: skip


def network(scale: float) -> nn.Module:
    torch.manual_seed(1)
    line = nn.Linear(16, 2)
    model = nn.Sequential(nn.Flatten(), line)
    with torch.no_grad():  # the boundary goes through the middle of the images
        line.bias.copy_(-line.weight.mul_(4).sum(1) / 2)
    add_noise(model, scale)
    return model.eval()


def judged(scale: float, *, eps: float = 0.05, parts: int = 2) -> NoiseResult:
    with torch.no_grad():
        labels = network(0.0)(IMAGES).argmax(1)
    rows = torch.arange(COUNT).chunk(parts)
    batches: list[tuple[Tensor, Tensor, Tensor]] = [(IMAGES[r], labels[r], r) for r in rows]
    return judge_noise(network(scale), batches, threat=ThreatModel(eps=eps), steps=10, seed=0)


def result(**figures: float) -> NoiseResult:
    blank = dict.fromkeys(FIGURES, 0.5)
    return NoiseResult(
        images=1, draws=10, steps=20, eps=0.01, clean_deviation=0, **(blank | figures)
    )


def test_with_scales_of_zero_noise_makes_no_difference_and_masks_nothing() -> None:
    found = judged(0.0)

    assert found.clean == found.silent_clean == 1
    assert found.clean_deviation == 0
    assert found.pgd == found.silent_pgd == found.eot == found.transfer == found.worst < 1
    assert found.masked is None


def test_nothing_of_eps_changes_nothing_but_the_noise() -> None:
    found = judged(1.0, eps=0.0)

    assert found.silent_worst == found.silent_clean == 1
    assert found.clean < 1
    assert found.clean_deviation > 0


def test_the_worst_is_no_better_than_any_attack_and_a_seed_repeats_it() -> None:
    found = judged(1.5)

    assert found.worst <= min(found.pgd, found.eot, found.transfer)
    assert found.silent_worst <= min(found.silent_pgd, found.silent_transfer)
    assert judged(1.5) == found


def test_without_noise_pgd_is_that_of_the_plain_network() -> None:
    found, plain = judged(2.0), network(0.0)
    with torch.no_grad():
        labels = plain(IMAGES).argmax(1)
    attacked = pgd(plain, IMAGES, labels, threat=ThreatModel(eps=0.05), steps=10)

    held = float(correct(plain(attacked), labels).float().mean())
    assert found.silent_pgd == pytest.approx(held, abs=2 / COUNT)  # it starts at random


@given(SHARES, SHARES, SHARES)
def test_masking_is_the_share_of_the_gain_that_better_attacks_take_back(pgd, worst, without):
    found = result(pgd=max(pgd, worst), worst=worst, silent_pgd=without)

    assert found.gain == found.pgd - without
    if found.gain <= 0:
        assert found.masked is None
    else:
        assert 0 <= found.masked <= 1
        if worst <= without:
            assert found.masked == 1
        if worst == found.pgd:
            assert found.masked == 0


def test_a_report_prints_all_of_it_together() -> None:
    values = {name: (number + 1) / 100 for number, name in enumerate(FIGURES)}

    text = "\n".join(noise_lines(result(**values | {"pgd": 0.42, "worst": 0.25})))

    assert all(f" {100 * v:.1f} " in text for n, v in values.items() if n not in ("pgd", "worst"))
    assert "seems to add 35.0 points under PGD; 49 % of that is masking" in text
    assert "adds no accuracy" in "\n".join(noise_lines(result()))


def test_repeated_images_count_once() -> None:
    with torch.no_grad():
        labels = network(0.0)(IMAGES).argmax(1)
    rows = torch.arange(COUNT)
    batches = [(IMAGES, labels, rows), (IMAGES[:4], labels[:4], rows[:4])]

    found = judge_noise(network(1.0), batches, threat=ThreatModel(eps=0.05), steps=2, seed=0)

    assert found.images == COUNT


def test_without_sanity_probes_a_noisy_network_is_judged_on_as_many_images_as_with_them() -> None:
    with_probes = AttackSettings(attacks=("pgd",), eps=(0.01,))
    without = with_probes.model_copy(update={"sanity_images": 0})

    assert len(judged_rows(without, 10_000)) == len(judged_rows(with_probes, 10_000)) == 256
    assert len(judged_rows(without, 5)) == 5
