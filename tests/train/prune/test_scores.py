"""HYDRA's scores: first values, the choice, and the straight-through gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.train.prune.scores import add_scores, first_scores, refresh, score_masks


class Odd(nn.Conv2d):
    """A convolution that computes something of its own."""


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))


IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_with_no_sparsity_it_is_the_network_itself() -> None:
    plain, scored = chain(), chain()
    assert add_scores(scored, 0.0) == ["0", "2"]

    assert torch.equal(scored(IMAGES), plain(IMAGES))


@given(st.floats(0, 0.95))
def test_a_pass_computes_with_the_chosen_weights_alone(sparsity: float) -> None:
    plain, scored = chain(), chain()
    add_scores(scored, sparsity)
    for name, mask in score_masks(scored).items():
        plain.get_parameter(name).data *= mask

    assert torch.equal(scored(IMAGES), plain(IMAGES))


def test_first_scores_are_the_weights_scaled_to_the_bound_of_kaimings_initialisation() -> None:
    weight = chain()[0].weight

    scores = first_scores(weight)

    assert torch.allclose(scores.abs().max(), torch.tensor((6 / 9) ** 0.5))
    assert torch.allclose(scores / weight, (scores / weight).mean().expand_as(weight), rtol=1e-4)


def test_the_gradient_of_a_score_is_that_of_the_used_weight_times_the_weight() -> None:
    scored, used = chain(), chain()
    add_scores(scored, 0.5)
    for name, mask in score_masks(scored).items():
        used.get_parameter(name).data *= mask
    (scored(IMAGES) ** 2).sum().backward()
    (used(IMAGES) ** 2).sum().backward()

    for place in (0, 2):
        layer, weight = scored[place], chain()[place].weight
        expected = used[place].weight.grad * weight * layer.score.view_as(weight).sign()
        assert torch.allclose(layer.score.grad.view_as(weight), expected, atol=1e-6)


def test_the_choice_follows_the_scores_when_it_is_made_again() -> None:
    scored = chain()
    add_scores(scored, 0.5)
    before = copy.deepcopy(score_masks(scored))
    with torch.no_grad():
        for place in (0, 2):
            scored[place].score.copy_(1 / scored[place].score)
    assert all(torch.equal(score_masks(scored)[name], before[name]) for name in before)

    refresh(scored, 0.5)

    assert all(torch.equal(score_masks(scored)[name], ~before[name]) for name in before)


def test_a_layer_that_computes_something_of_its_own_is_named() -> None:
    with pytest.raises(TypeError, match="layer 0 is a Odd"):
        add_scores(nn.Sequential(Odd(2, 2, 3)), 0.5)
