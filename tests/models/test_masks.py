"""Laws of masks: exactly so many weights, the largest, and zeros that stay."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.models.masks import (
    apply_masks,
    cut_layers,
    layer_masks,
    magnitude_masks,
    nonzero_masks,
    prunable,
    zero_share,
)

SHARES = st.floats(0, 1, exclude_max=True)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def weights_of(sizes: list[int], seed: int, *, equal: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        str(number): torch.ones(size, 2) if equal else torch.randn(size, 2, generator=generator)
        for number, size in enumerate(sizes)
    }


@given(SIZES, SHARES, st.integers(0, 99), st.booleans())
def test_the_masks_of_all_layers_prune_exactly_the_share(sizes, sparsity, seed, equal) -> None:
    weights = weights_of(sizes, seed, equal=equal)

    for choose in (magnitude_masks, layer_masks):
        masks = choose(weights, sparsity)
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        assert pruned == round(sparsity * 2 * sum(sizes))
        assert {name: mask.shape for name, mask in masks.items()} == {
            name: weight.shape for name, weight in weights.items()
        }


@given(SIZES, SHARES, st.integers(0, 99))
def test_no_weight_of_any_layer_that_is_pruned_is_larger_than_one_that_is_kept(
    sizes, sparsity, seed
) -> None:
    weights = weights_of(sizes, seed)
    masks = magnitude_masks(weights, sparsity)

    sizes = {n: w.abs() / w.square().mean().sqrt() for n, w in weights.items()}
    kept = torch.cat([sizes[n][mask] for n, mask in masks.items()])
    pruned = torch.cat([sizes[n][~mask] for n, mask in masks.items()])
    assert len(kept) == 0 or len(pruned) == 0 or pruned.max() <= kept.min()


@given(SIZES, SHARES, st.integers(0, 99), st.integers(-20, 20))
def test_the_scale_of_a_layer_decides_nothing(sizes, sparsity, seed, exponent) -> None:
    weights = weights_of(sizes, seed)
    scaled = weights | {"0": weights["0"] * 2.0**exponent}

    one, other = magnitude_masks(weights, sparsity), magnitude_masks(scaled, sparsity)

    assert all(torch.equal(one[name], other[name]) for name in one)


@given(SIZES, SHARES, st.integers(0, 99))
def test_every_layer_loses_the_same_share_of_its_scores_up_to_one(sizes, sparsity, seed) -> None:
    scores = weights_of(sizes, seed)

    for name, mask in layer_masks(scores, sparsity).items():
        assert abs(int((~mask).sum()) - sparsity * scores[name].numel()) <= 1
        kept, pruned = scores[name][mask].abs(), scores[name][~mask].abs()
        assert len(kept) == 0 or len(pruned) == 0 or pruned.max() <= kept.min()


@given(SIZES, SIZES, SHARES, st.integers(0, 99), st.sampled_from([magnitude_masks, layer_masks]))
def test_layers_with_few_inputs_stay_whole_while_the_others_have_enough_to_lose(
    thin, wide, sparsity, seed, choose
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = {
        f"depthwise {n}": torch.randn(k, 1, 3, 3, generator=draw) for n, k in enumerate(thin)
    }
    weights |= {f"wide {n}": torch.randn(k, 32, generator=draw) for n, k in enumerate(wide)}

    masks = choose(weights, sparsity)

    pruned = round(sparsity * (9 * sum(thin) + 32 * sum(wide)))
    assert sum(int((~mask).sum()) for mask in masks.values()) == pruned
    enough = pruned <= 0.99 * 32 * sum(wide)
    assert cut_layers(weights, sparsity) == [n for n in weights if "wide" in n or not enough]
    assert not enough or all(mask.all() for n, mask in masks.items() if "wide" not in n)


@given(SIZES, SHARES, st.integers(0, 99))
def test_masked_weights_are_zero_the_others_untouched_and_the_zeros_are_the_mask(
    sizes, sparsity, seed
) -> None:
    weights = weights_of(sizes, seed)
    masks, before = magnitude_masks(weights, sparsity), {n: w.clone() for n, w in weights.items()}

    apply_masks(weights, masks)

    for name, mask in masks.items():
        assert torch.equal(weights[name], torch.where(mask, before[name], 0.0))
        assert torch.equal(nonzero_masks(weights)[name], mask)
    total = 2 * sum(sizes)
    assert zero_share(weights) == round(sparsity * total) / total


def test_a_weight_that_is_not_finite_becomes_zero_as_well() -> None:
    weight = torch.tensor([torch.inf, torch.nan, 1.0])

    apply_masks({"w": weight}, {"w": torch.tensor([False, False, True])})

    assert weight.tolist() == [0, 0, 1]


def test_weights_of_convolutions_and_linear_layers_are_prunable_and_nothing_else() -> None:
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)

    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(prunable(model)) == {f"{name}.weight" for name in layers}
