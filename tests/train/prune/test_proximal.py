"""The proximal step of the lasso is soft thresholding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.models.masks import layer_scale
from medspark.train.prune.proximal import even_penalty, soft_threshold_

NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30)


@given(NUMBERS, st.floats(0, 5))
def test_the_step_is_the_closed_form(numbers: list[float], amount: float) -> None:
    weight = torch.tensor(numbers, dtype=torch.float64)
    expected = weight.sign() * (weight.abs() - amount).clamp_min(0)

    soft_threshold_(weight, amount)

    assert torch.allclose(weight, expected, atol=1e-12)


@given(NUMBERS, st.floats(0.01, 5))
def test_the_step_minimises_half_the_squared_distance_plus_the_lasso(numbers, amount) -> None:
    before = torch.tensor(numbers, dtype=torch.float64)
    after = before.clone()
    soft_threshold_(after, amount)

    def cost(at: torch.Tensor) -> torch.Tensor:
        return 0.5 * (at - before) ** 2 + amount * at.abs()

    for move in (-0.1, -1e-4, 1e-4, 0.1):
        assert (cost(after) <= cost(after + move) + 1e-12).all()


@given(
    st.lists(st.floats(0.01, 10), min_size=2, max_size=30, unique=True),
    st.floats(0, 0.99),
    st.lists(st.floats(0.001, 1), min_size=1, max_size=20),
)
def test_the_even_penalty_alone_brings_the_share_of_weights_to_zero(numbers, sparsity, rates):
    weight = torch.tensor(numbers, dtype=torch.float64)
    penalty, unit = even_penalty([weight], sparsity, rates), float(layer_scale(weight))

    for rate in rates:
        soft_threshold_(weight, rate * penalty * unit)

    # The last of them is at zero up to rounding.
    zeros = int((weight.abs() <= 1e-6).sum())
    assert zeros >= round(sparsity * len(numbers))
    if round(sparsity * len(numbers)) == 0:
        assert penalty == 0
