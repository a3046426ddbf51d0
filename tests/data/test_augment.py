"""Augmentation is keyed by the row: it does not matter who reads a row, or with which others."""

from __future__ import annotations

import numpy as np
import pytest

from medspark.data.augment import augment
from medspark.data.config import AugmentConfig

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 2), dtype=np.uint8)
ROWS = np.arange(40, dtype=np.int64)


def varied(rows: np.ndarray, *, epoch: int = 0, **chosen: float) -> np.ndarray:
    config = AugmentConfig(**chosen)
    return augment(IMAGES[rows].copy(), ROWS[rows], config=config, seed=1, epoch=epoch)


@pytest.mark.parametrize("chosen", [{"flip": 0.5}, {"flip": 0.5, "shift": 0.25}], ids=str)
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
