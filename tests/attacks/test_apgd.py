"""Auto-PGD by the algorithm of its paper (Croce and Hein 2020): when it halves, what it keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.attacks.apgd import _checkpoints, _Climb, apgd
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.threat import ThreatModel

THREAT = ThreatModel(eps=0.2)
NOBODY = torch.zeros(3, dtype=torch.long)


class Hills(nn.Module):
    """A network that is always right, and whose loss has many hills."""

    def forward(self, images: Tensor) -> Tensor:
        height = (torch.sin(40 * images) + images).flatten(1).sum(1)
        return torch.stack([torch.full_like(height, 100.0), height], dim=1)


class Plain(nn.Module):
    """A network that is always right and gives the same logits for all images."""

    def forward(self, images: Tensor) -> Tensor:
        flat = 0 * images.flatten(1).sum(1)
        return torch.stack([flat + 1, flat], dim=1)


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def given_images(seed: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 2, 2, generator=generator, dtype=torch.float64)


def by_the_book(network: nn.Module, clean: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the best point of one image, a literal transcription of algorithm 1."""

    def look(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_(True)
        value = lead(network(x), NOBODY[:1])
        (slope,) = torch.autograd.grad(value.sum(), x)
        return float(value.detach()), slope

    def allowed(x: Tensor) -> Tensor:
        return x.clamp(clean - THREAT.eps, clean + THREAT.eps).clamp(0, 1)

    step, before, x = float(torch.tensor(2 * THREAT.eps)), start, start
    values = [look(x)[0]]
    best, best_value, best_slope = x, *look(x)
    slope, rises = best_slope, 0
    looked_at, halved, since = best_value, True, 0
    for number in range(1, steps + 1):
        ahead = allowed(x + step * slope.sign())
        x, before = allowed(x + 0.75 * (ahead - x) + 0.25 * (x - before)), x
        value, slope = look(x)
        rises += value > values[-1]
        values.append(value)
        if value > best_value:
            best, best_value, best_slope = x, value, slope
        if number not in _checkpoints(steps):
            continue
        period, since = number - since, number
        few, none_new = rises < 0.75 * period, not halved and best_value <= looked_at
        halved, looked_at, rises = few or none_new, best_value, 0
        if halved:
            step, x, before, slope = step / 2, best, best, best_slope
            values.append(best_value)
    return best


@given(st.integers(1, 40), st.integers(0, 1000))
def test_every_image_ends_where_the_algorithm_of_the_paper_ends(steps: int, seed: int) -> None:
    images, network = given_images(seed), Hills()
    rng = KeyedRandom.for_whole(images, seed=seed)

    found = apgd(network, images, NOBODY, threat=THREAT, loss=lead, rng=rng, steps=steps)

    starts = THREAT.random_start(images, rng.noise(images, "apgd"))
    for i in range(3):
        alone = by_the_book(network, images[i : i + 1], starts[i : i + 1], steps)
        torch.testing.assert_close(found[i : i + 1], alone)


def test_a_hundred_steps_are_looked_at_where_autoattack_looks_at_them() -> None:
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]


@given(st.integers(1, 300))
def test_every_look_back_covers_the_steps_since_the_last_one(steps: int) -> None:
    looks = _checkpoints(steps)

    at = [0, *looks]
    assert list(looks.values()) == [after - before for before, after in pairwise(at)]
    assert at[-1] <= steps


def climb(network: nn.Module, count: int) -> _Climb:
    images, labels = given_images(0, count), NOBODY[:1].expand(count)
    return _Climb.begin(network, images, labels, threat=THREAT, loss=lead, start=images)


def test_the_step_is_halved_after_fewer_rises_than_three_in_four() -> None:
    state = climb(Hills(), 5)
    state.rises = torch.tensor([0.0, 2.0, 3.0, 4.0, 5.0]).double()
    state.best_loss = state.best_loss + 1

    state.adapt(4)

    assert state.halved.tolist() == [True, True, False, False, False]
    assert state.step.flatten().tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.4])
    assert state.rises.tolist() == [0] * 5


def test_the_step_is_halved_where_nothing_better_was_found_and_it_was_not_halved_before() -> None:
    state = climb(Hills(), 4)
    state.rises = torch.full((4,), 4.0).double()
    state.halved = torch.tensor([False, True, False, True])
    state.best_loss = state.best_loss + torch.tensor([0.0, 0.0, 1.0, 1.0])

    state.adapt(4)

    assert state.halved.tolist() == [True, False, False, False]


def test_halving_goes_back_to_the_best_and_going_on_does_not() -> None:
    state = climb(Hills(), 2)
    state.rises = torch.tensor([0.0, 4.0]).double()
    state.best_loss = state.best_loss + 1
    state.best, state.best_gradient = state.best + 0.1, state.best_gradient + 1
    before = replace(state)

    state.adapt(4)

    for name, target in (("current", "best"), ("previous", "best"), ("gradient", "best_gradient")):
        assert torch.equal(getattr(state, name)[0], getattr(before, target)[0])
        assert torch.equal(getattr(state, name)[1], getattr(before, name)[1])
    assert state.loss.tolist() == [float(before.best_loss[0]), float(before.loss[1])]
    assert torch.equal(state.best_at_checkpoint, before.best_loss)


def test_standing_still_is_no_rise() -> None:
    state = climb(Plain(), 3)

    state.advance(Plain(), THREAT, lead)

    assert state.rises.tolist() == [0, 0, 0]


@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_the_first_step_is_as_long_as_the_ball_is_wide(eps: float) -> None:
    images = given_images(1)
    state = _Climb.begin(
        Hills(), images, NOBODY, threat=ThreatModel(eps=eps), loss=lead, start=images
    )

    assert state.step.flatten().tolist() == pytest.approx([2 * eps] * 3)
