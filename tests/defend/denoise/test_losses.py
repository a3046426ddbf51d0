"""The losses of a denoiser and of its detector."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medspark.defend.denoise.losses import guidance, reconstruction, supervised_contrast


def unit(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, generator=generator, dtype=torch.float64), dim=1)


def term_by_term(h: Tensor, attacked: list[bool], temperature: float) -> float:
    """The loss as the paper writes it: a sum over images, pairs and others."""
    losses = []
    for i in range(len(h)):
        others = [a for a in range(len(h)) if a != i]
        pairs = [p for p in others if attacked[p] == attacked[i]]
        total = sum(math.exp(float(h[i] @ h[a]) / temperature) for a in others)
        logs = [math.log(math.exp(float(h[i] @ h[p]) / temperature) / total) for p in pairs]
        if pairs:
            losses.append(-sum(logs) / len(pairs))
    return sum(losses) / len(losses)


@given(attacked=st.lists(st.booleans(), min_size=3, max_size=8), temperature=st.floats(0.1, 2))
def test_the_contrastive_loss_is_the_published_sum(attacked: list[bool], temperature: float):
    embeddings = unit(len(attacked))

    loss = supervised_contrast(embeddings, torch.tensor(attacked), temperature=temperature)

    assert float(loss) == pytest.approx(term_by_term(embeddings, attacked, temperature))


@given(order=st.permutations(range(6)))
def test_the_contrastive_loss_does_not_depend_on_the_order(order: list[int]) -> None:
    embeddings, attacked = unit(6), torch.tensor([False] * 3 + [True] * 3)

    shuffled = supervised_contrast(embeddings[order], attacked[order], temperature=0.5)

    assert float(shuffled) == pytest.approx(
        float(supervised_contrast(embeddings, attacked, temperature=0.5))
    )


def test_the_contrastive_loss_is_lower_where_the_classes_lie_apart() -> None:
    attacked = torch.tensor([False, False, True, True])
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])

    def loss(embeddings: Tensor) -> float:
        return float(supervised_contrast(embeddings, attacked, temperature=0.1))

    assert loss(apart) < 0.01 < loss(apart[[0, 2, 1, 3]])


@pytest.mark.parametrize("attacked", [[True], [True, False]])
def test_a_batch_without_a_pair_has_no_contrast_and_a_gradient_of_zero(attacked) -> None:
    embeddings = unit(len(attacked)).requires_grad_(True)

    loss = supervised_contrast(embeddings, torch.tensor(attacked), temperature=0.1)
    loss.backward()

    assert loss.item() == 0
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() == 0


@given(factor=st.floats(0.1, 10), eps=st.floats(1e-3, 0.1))
def test_distances_have_no_unit(factor: float, eps: float) -> None:
    x, y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()

    assert float(guidance(factor * x, factor * y)) == pytest.approx(float(guidance(x, y)))
    scaled = reconstruction(factor * x, factor * y, eps=factor * eps)
    assert float(scaled) == pytest.approx(float(reconstruction(x, y, eps=eps)))


@given(size=st.floats(1e-3, 1), seed=st.integers(0, 9))
def test_near_the_clean_image_a_small_change_costs_next_to_nothing(size: float, seed: int) -> None:
    x, change = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()

    for loss in (guidance, partial(reconstruction, eps=0.01)):
        whole, half = (float(loss(x + step * change, x)) for step in (size, size / 2))
        assert half == pytest.approx(whole / 4)
