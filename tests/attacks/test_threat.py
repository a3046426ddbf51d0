"""The threat model, in both norms."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medspark.attacks.threat import ThreatModel, norms
from medspark.eps import LARGEST

NORMS: list[Literal["linf", "l2"]] = ["linf", "l2"]
budgets = st.floats(0, LARGEST, allow_subnormal=False)
threats = st.builds(ThreatModel, norm=st.sampled_from(NORMS), eps=budgets)


def images(seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(3, 2, 5, 4, generator=generator)


@given(threats, st.integers(0, 1000))
def test_whatever_is_projected_is_allowed(threat: ThreatModel, seed: int) -> None:
    clean = images(seed)

    projected = threat.project(images(seed + 1, -3, 3), clean)

    assert threat.holds(projected, clean).all()


@given(threats, st.integers(0, 1000))
def test_projecting_twice_changes_nothing(threat: ThreatModel, seed: int) -> None:
    clean = images(seed)
    once = threat.project(images(seed + 1, -3, 3), clean)

    torch.testing.assert_close(threat.project(once, clean), once, rtol=0, atol=1e-6)


@given(threats, st.integers(0, 1000))
def test_what_is_allowed_already_stays_where_it_is(threat: ThreatModel, seed: int) -> None:
    clean = images(seed)

    torch.testing.assert_close(threat.project(clean, clean), clean, rtol=0, atol=0)


@given(threats, st.integers(0, 1000))
def test_random_starts_are_allowed(threat: ThreatModel, seed: int) -> None:
    clean = images(seed)

    assert threat.holds(threat.random_start(clean, images(seed + 1)), clean).all()


@pytest.mark.parametrize("norm", NORMS)
def test_images_outside_are_told_apart(norm: Literal["linf", "l2"]) -> None:
    clean, threat = images(0, 0.4, 0.6), ThreatModel(norm=norm, eps=0.1)

    held = threat.holds(clean + torch.tensor([0.09, 0.11, 0.5]).view(3, 1, 1, 1), clean)

    assert held.tolist() == [True, False, False]


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_as_long_as_the_budget_of_its_length(norm: Literal["linf", "l2"]) -> None:
    threat = ThreatModel(norm=norm, eps=0.1)
    gradient = images(0, -1, 1)

    step = 0.1 * threat.ascend(gradient)

    size = step.abs().amax((1, 2, 3)) if norm == "linf" else norms(step).flatten()
    torch.testing.assert_close(size, torch.full((3,), threat.radius(gradient)))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_and_no_number_mean_no_step(norm: Literal["linf", "l2"]) -> None:
    gradient = torch.zeros(1, 1, 2, 2)
    gradient[0, 0, 0, 0] = torch.nan

    assert (ThreatModel(norm=norm).ascend(gradient) == 0).all()


def test_budgets_may_be_written_as_grey_levels() -> None:
    assert ThreatModel.model_validate({"eps": "2/255"}).eps == 2 / 255
    assert str(ThreatModel(eps=2 / 255)) == "linf 2/255"


@given(threats, st.integers(0, 1000))
def test_any_allowed_image_stays_where_it_is(threat: ThreatModel, seed: int) -> None:
    clean = images(seed)
    change = images(seed + 1, -1, 1)
    inside = change if threat.norm == "linf" else change / norms(change) * clean[0].numel() ** 0.5
    allowed = (clean + 0.999 * threat.eps * inside).clamp(0, 1)

    torch.testing.assert_close(threat.project(allowed, clean), allowed, rtol=0, atol=1e-6)


@given(budgets, st.integers(0, 1000))
def test_in_linf_every_pixel_goes_to_the_nearest_allowed_value(eps: float, seed: int) -> None:
    clean, far = images(seed), images(seed + 1, -3, 3)

    projected = ThreatModel(eps=eps).project(far, clean)

    low, high = (clean - eps).clamp_min(0), (clean + eps).clamp_max(1)
    torch.testing.assert_close(projected, torch.clamp(far, low, high), rtol=0, atol=1e-6)


@given(st.floats(0.001, 0.05), st.floats(0.1, 10), st.integers(0, 1000))
def test_in_l2_an_image_outside_comes_back_along_the_straight_line(
    eps: float, far: float, seed: int
) -> None:
    clean, change = images(seed, 0.4, 0.6), images(seed + 1, -1, 1)
    radius = eps * clean[0].numel() ** 0.5
    unit = change / norms(change)

    projected = ThreatModel(norm="l2", eps=eps).project(clean + far * radius * unit, clean)

    expected = clean + min(far, 1.0) * radius * unit
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-5)


@given(budgets, st.integers(0, 1000))
def test_a_random_start_is_centred_on_the_image_and_reaches_all_of_its_ball(
    eps: float, seed: int
) -> None:
    clean, noise = images(seed, 0.4, 0.6), images(seed + 1)
    threat = ThreatModel(eps=eps)

    change = threat.random_start(clean, noise) - clean

    torch.testing.assert_close(change, eps * (2 * noise - 1), rtol=0, atol=1e-6)
    opposite = threat.random_start(clean, 1 - noise) - clean
    torch.testing.assert_close(change, -opposite, rtol=0, atol=1e-6)


@given(st.floats(0, 0.05, allow_subnormal=False), st.integers(0, 1000))
def test_a_random_start_in_l2_has_any_direction_and_any_length_up_to_the_budget(
    eps: float, seed: int
) -> None:
    clean, noise = images(seed, 0.4, 0.6), images(seed + 1)
    threat = ThreatModel(norm="l2", eps=eps)

    change = threat.random_start(clean, noise) - clean

    way = 2 * noise - 1
    length = threat.radius(clean) * noise[:, :1, :1, :1]
    torch.testing.assert_close(change, length * way / norms(way), rtol=0, atol=1e-5)


def test_an_image_is_outside_where_one_pixel_leaves_the_range() -> None:
    clean = torch.full((2, 1, 2, 2), 0.05)
    left = clean.clone()
    left[0, 0, 0, 0] -= 0.06

    assert ThreatModel(eps=0.1).holds(left, clean).tolist() == [False, True]
    assert ThreatModel(eps=0.1).holds(1 - left, 1 - clean).tolist() == [False, True]


def test_the_tolerance_is_of_rounding_alone() -> None:
    clean, threat = torch.full((1, 1, 2, 2), 0.5), ThreatModel(eps=2 / 255)

    assert threat.holds(clean + 2 / 255, clean).all()
    assert not threat.holds(clean + 2.01 / 255, clean).any()


def test_nobody_who_asks_for_nothing_gets_another_budget() -> None:
    assert ThreatModel() == ThreatModel(norm="linf", eps=2 / 255)


@given(st.integers(0, 1000))
def test_a_step_climbs_along_the_gradient(seed: int) -> None:
    gradient = images(seed, -1, 1)

    l2 = ThreatModel(norm="l2").ascend(gradient)

    assert torch.equal(ThreatModel().ascend(gradient), gradient.sign())
    torch.testing.assert_close(l2 / norms(l2), gradient / norms(gradient))
