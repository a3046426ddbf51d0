"""Weights that are rounded together take back each other's errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medspark.export import rounding
from medspark.export.rounding import rounded_together


def _drawn(seed: int, *, groups: int = 2, columns: int = 12) -> tuple[Tensor, Tensor]:
    """Return weights (G, 3, D), and the covariance (G, D, D) of inputs that vary together."""
    generator = torch.Generator().manual_seed(seed)
    weights = 20 * torch.randn(groups, 3, columns, generator=generator)
    causes = torch.randn(groups, 200, 3, generator=generator)
    mixed = causes @ torch.randn(groups, 3, columns, generator=generator)
    inputs = mixed + 0.1 * torch.randn(groups, 200, columns, generator=generator)
    return weights, inputs.mT @ inputs / 200


def _together(weights: Tensor, covariance: Tensor) -> Tensor:
    highest = torch.full_like(weights, 127)
    return rounded_together(weights, covariance, low=-highest, high=highest)


def _error(found: Tensor, weights: Tensor, covariance: Tensor) -> Tensor:
    """Return the variance of the output's change for each row (G, 3)."""
    change = found - weights
    return ((change @ covariance) * change).sum(2)


@given(seed=st.integers(0, 1000))
def test_outputs_change_less_than_with_nearest_weights(seed: int) -> None:
    weights, covariance = _drawn(seed)

    found = _together(weights, covariance)

    nearest = weights.round().clamp(-127, 127)
    errors = [_error(each, weights, covariance).sum() for each in (found, nearest)]
    assert errors[0] < errors[1] / 2


@given(seed=st.integers(0, 1000))
def test_weights_are_whole_numbers_within_their_bounds(seed: int) -> None:
    weights, covariance = _drawn(seed)
    low, high = weights.round() - 1, weights.round()

    found = rounded_together(weights, covariance, low=low, high=high)

    assert torch.equal(found, found.round())
    assert ((low <= found) & (found <= high)).all()


@given(seed=st.integers(0, 1000))
def test_inputs_that_do_not_vary_together_leave_the_nearest_weights(seed: int) -> None:
    weights, _ = _drawn(seed)
    apart = torch.diag_embed(torch.rand(2, 12, generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(_together(weights, apart), weights.round().clamp(-127, 127))


def test_an_input_that_is_always_zero_harms_nothing() -> None:
    weights, covariance = _drawn(0)
    covariance[:, 3], covariance[:, :, 3] = 0, 0

    assert torch.isfinite(_together(weights, covariance)).all()
    assert torch.isfinite(_together(weights, torch.zeros_like(covariance))).all()


@pytest.mark.parametrize("block", [1, 5])
def test_blocks_only_save_time(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    weights, covariance = _drawn(0)
    whole = _together(weights.double(), covariance)

    monkeypatch.setattr(rounding, "_BLOCK", block)

    assert torch.equal(_together(weights.double(), covariance), whole)
