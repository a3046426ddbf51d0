"""Measures of how near two images are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from medspark.evaluate.quality import psnr, ssim

IMAGES = torch.rand(3, 2, 24, 31, generator=torch.Generator().manual_seed(0)).double()


@given(change=st.floats(1e-4, 0.5))
def test_psnr_of_an_even_change_is_its_size_in_decibels(change: float) -> None:
    found = psnr(IMAGES + change, IMAGES)

    assert found.tolist() == pytest.approx([-20 * math.log10(change)] * 3)


def test_equal_images_have_the_highest_ratio_and_similarity() -> None:
    assert psnr(IMAGES, IMAGES).tolist() == [100.0] * 3
    assert ssim(IMAGES, IMAGES).tolist() == pytest.approx([1.0] * 3)


def test_ssim_is_that_of_wang_et_al() -> None:
    other = (IMAGES + 0.1 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
             ).clamp(0, 1)  # fmt: skip

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    def plane(x: np.ndarray, y: np.ndarray) -> float:
        mx, my = smooth(x), smooth(y)
        vx, vy, cov = (smooth(a) - b for a, b in ((x * x, mx**2), (y * y, my**2), (x * y, mx * my)))
        c1, c2 = 0.01**2, 0.03**2
        return float(
            (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        )

    expected = [
        np.mean([plane(x, y) for x, y in zip(first, second, strict=True)])
        for first, second in zip(IMAGES.numpy(), other.numpy(), strict=True)
    ]
    assert ssim(IMAGES, other).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("side", [1, 5, 11])
def test_images_smaller_than_the_window_have_a_similarity(side: int) -> None:
    small = IMAGES[:, :, :side, :side]

    assert ssim(small, small).tolist() == pytest.approx([1.0] * 3)
