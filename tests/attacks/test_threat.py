"""What an attacker may do, in both norms."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medspark.attacks.threat import ThreatModel, norms

NORMS: list[Literal["linf", "l2"]] = ["linf", "l2"]
threats = st.builds(
    ThreatModel, norm=st.sampled_from(NORMS), eps=st.floats(0, 1, allow_subnormal=False)
)


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
