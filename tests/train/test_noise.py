"""Noise depends on (key, row) only, and is uniform and uncorrelated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medspark.train.noise import keyed_noise

ROWS = np.arange(64, dtype=np.int64)


def noise(rows: np.ndarray, *, key: int = 1, channels: int = 3) -> torch.Tensor:
    return keyed_noise(torch.zeros(len(rows), channels, 16, 16), rows, key=key)


def test_a_row_gets_the_same_noise_in_any_company():
    together, alone = noise(ROWS), torch.cat([noise(ROWS[i : i + 1]) for i in range(64)])

    assert torch.equal(together, alone)


def test_rows_keys_and_pixels_differ():
    assert not torch.equal(noise(ROWS)[0], noise(ROWS)[1])
    assert not torch.equal(noise(ROWS), noise(ROWS, key=2))
    assert len(noise(ROWS[:1]).unique()) > 700


@pytest.mark.parametrize("device", ["pretended", "cuda"], indirect=True)
def test_every_device_makes_the_same_noise(device: torch.device):
    images = torch.zeros(64, 3, 16, 16, device=device)

    assert torch.equal(keyed_noise(images, ROWS, key=1).cpu(), noise(ROWS))


def test_noise_is_uniform_and_uncorrelated():
    values = noise(np.arange(256, dtype=np.int64)).flatten(1)

    counts = torch.histc(values, bins=16, min=-1, max=1)
    expected = values.numel() / 16
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 37.7  # 99.9 % of uniform noise, 15 degrees of freedom
    between_rows = torch.corrcoef(values[:64]) - torch.eye(64)
    assert between_rows.abs().max() < 5 / values.shape[1] ** 0.5
    neighbours = (values[:, 1:] * values[:, :-1]).mean()
    assert neighbours.abs() < 4 / 3 / values.numel() ** 0.5


def test_noise_reaches_both_ends_and_its_mean_is_nothing():
    values = noise(np.arange(256, dtype=np.int64))

    assert -1 <= values.min() < -0.999
    assert 0.999 < values.max() < 1
    assert abs(values.mean()) < 0.01
