"""Augmentation is keyed by the row: it is the same on any rank and in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.data.augment import augment
from medspark.data.config import AugmentConfig

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 2), dtype=np.uint8)
ROWS = np.arange(40, dtype=np.int64)


def varied(rows: np.ndarray, *, epoch: int = 0, **chosen: float) -> np.ndarray:
    config = AugmentConfig(**chosen)
    return augment(IMAGES[rows].copy(), ROWS[rows], config=config, seed=1, epoch=epoch)


@pytest.mark.parametrize(
    "chosen",
    [{"flip": 0.5}, {"flip": 0.5, "shift": 0.25}, {"flip": 0.5, "shift": 0.25, "turn": 0.75}],
    ids=str,
)
def test_a_row_looks_the_same_in_any_company(chosen: dict[str, float]):
    together = varied(ROWS, **chosen)
    alone = np.concatenate([varied(ROWS[i : i + 1], **chosen) for i in range(40)])

    assert np.array_equal(together, alone)


def test_flips_mirror_about_half_of_the_images_and_differ_between_epochs():
    first, second = varied(ROWS, flip=0.5), varied(ROWS, flip=0.5, epoch=1)

    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(first, IMAGES, strict=True)]
    assert 10 < sum(mirrored) < 30
    assert not np.array_equal(first, second)


def test_a_shift_moves_by_at_most_its_reach_and_repeats_the_edge():
    moved = varied(ROWS, flip=0, shift=0.25)

    for image, original in zip(moved, IMAGES, strict=True):
        padded = np.pad(original, ((2, 2), (2, 2), (0, 0)), mode="edge")
        windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(np.array_equal(image, window) for window in windows)
    assert not np.array_equal(moved, IMAGES)


def test_nothing_asked_for_changes_nothing():
    assert np.array_equal(varied(ROWS, flip=0, shift=0), IMAGES)


def test_another_seed_flips_shifts_and_turns_others():
    def with_seed(seed: int, **chosen: float) -> np.ndarray:
        config = AugmentConfig(**chosen)
        return augment(IMAGES.copy(), ROWS, config=config, seed=seed, epoch=0)

    for chosen in ({"flip": 0.5}, {"flip": 0, "shift": 0.25}, {"flip": 0, "turn": 0.75}):
        assert np.array_equal(with_seed(1, **chosen), with_seed(1, **chosen))
        assert not np.array_equal(with_seed(1, **chosen), with_seed(2, **chosen))


def test_another_epoch_turns_otherwise():
    first, second = (varied(ROWS, epoch=epoch, flip=0, turn=0.75) for epoch in (0, 1))

    assert not np.array_equal(first, second)


def test_another_epoch_shifts_otherwise():
    assert not np.array_equal(
        varied(ROWS, flip=0, shift=0.25), varied(ROWS, epoch=1, flip=0, shift=0.25)
    )


@given(st.sampled_from([0.0, 0.2, 0.9, 1.0]), st.integers(0, 100))
def test_as_many_are_mirrored_as_asked_for_and_all_the_others_are_left(flip: float, seed: int):
    rows = np.arange(2000)
    images = np.broadcast_to(np.array([0, 1], dtype=np.uint8)[:, None], (2000, 1, 2, 1)).copy()

    found = augment(images, rows, config=AugmentConfig(flip=flip), seed=seed, epoch=0)

    mirrored = found[:, 0, 0, 0] == 1
    assert ((found.sum((1, 2, 3))) == 1).all()
    assert abs(mirrored.mean() - flip) <= (0.06 if 0 < flip < 1 else 0)


def shifts(**chosen: float) -> set[tuple[int, int]]:
    """Return by how much (down, right) images of one bright pixel are moved."""
    rows = np.arange(500)
    images = np.zeros((500, 9, 9, 1), dtype=np.uint8)
    images[:, 4, 4] = 1
    config = AugmentConfig(**chosen)
    found = augment(images, rows, config=config, seed=0, epoch=0)
    return {(int(y) - 4, int(x) - 4) for _, y, x, _ in np.argwhere(found)}


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_a_shift_goes_every_way_in_both_directions_independently(flip: float):
    reach = range(-2, 3)

    assert shifts(flip=flip, shift=0.22) == {(y, x) for y in reach for x in reach}


def test_a_shifted_image_is_mirrored_as_well():
    config = AugmentConfig(flip=1.0, shift=0.25)

    found = augment(IMAGES.copy(), ROWS, config=config, seed=1, epoch=0)

    assert np.array_equal(found, varied(ROWS, flip=0, shift=0.25)[:, :, ::-1])


def turns(count: int, shape: tuple[int, int], turn: float) -> list[float]:
    """Return the shares of ``count`` images that are turned by 0, 1, 2 and 3 quarters."""
    rows = np.arange(count)
    image = np.random.default_rng(1).integers(0, 256, (*shape, 1), dtype=np.uint8)
    images = np.broadcast_to(image, (count, *image.shape)).copy()
    found = augment(images, rows, config=AugmentConfig(flip=0, turn=turn), seed=0, epoch=0)
    turned = [np.rot90(image, number) for number in range(4)]
    return [sum(np.array_equal(f, each) for f in found) / count for each in turned]


def test_quarters_are_equally_likely_and_as_many_as_asked_for():
    for turn in (0.3, 0.75, 1.0):
        shares = turns(2000, (5, 5), turn)
        assert sum(shares) == 1
        assert shares == pytest.approx([1 - turn, turn / 3, turn / 3, turn / 3], abs=0.04)


def test_images_that_are_not_square_are_turned_by_a_half():
    shares = turns(400, (4, 6), 0.5)

    assert shares[0] + shares[2] == 1
    assert shares[2] == pytest.approx(0.5, abs=0.1)


def test_a_flipped_and_shifted_image_is_turned_as_well():
    moved = varied(ROWS, flip=1.0, shift=0.25)

    for image, original in zip(varied(ROWS, flip=1.0, shift=0.25, turn=1.0), moved, strict=True):
        assert any(np.array_equal(image, np.rot90(original, k)) for k in (1, 2, 3))


def test_a_configuration_without_turns_is_written_as_before_there_were_any():
    assert AugmentConfig().model_dump() == {"flip": 0.5, "shift": 0.0}
    for config in (AugmentConfig(), AugmentConfig(turn=0.75)):
        assert AugmentConfig.model_validate(config.model_dump(mode="json")) == config
