"""The random numbers of an attack belong to the image, not to the batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.attacks.keyed_random import KeyedRandom

IMAGES = torch.zeros(6, 2, 3, 3)


@given(st.permutations(range(6)), st.integers(1, 6))
def test_an_image_draws_the_same_in_any_batch(order: list[int], size: int) -> None:
    rows, chosen = torch.arange(6) + 100, torch.tensor(order[:size])
    whole = KeyedRandom(1, rows)

    assert torch.equal(
        whole.of(chosen).noise(IMAGES[chosen], "start"), whole.noise(IMAGES, "start")[chosen]
    )


def test_another_purpose_seed_or_row_draws_otherwise() -> None:
    first = KeyedRandom.for_whole(IMAGES).noise(IMAGES, "start")

    assert not torch.equal(first, KeyedRandom.for_whole(IMAGES).noise(IMAGES, "other"))
    assert not torch.equal(first, KeyedRandom.for_whole(IMAGES, seed=1).noise(IMAGES, "start"))
    assert not torch.equal(first[0], first[1])


def test_numbers_fill_the_unit_interval_without_reaching_one() -> None:
    numbers = KeyedRandom.for_whole(torch.zeros(1000, 1)).numbers(50, "numbers")

    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
