"""Keyed noise, computed on the device: an image gets the same noise on any rank, in any batch.

The noise is a 32-bit integer hash of (key, dataset row, pixel). Torch's generators do not suffice:
their streams differ between CPU and GPU and depend on earlier draws.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medspark.data.batch import Integers
from medspark.seeding import hash64

__all__ = ["keyed_noise"]


def keyed_noise(images: Tensor, rows: Integers, *, key: int) -> Tensor:
    """Return noise, uniform in [-1, 1), in the shape of ``images`` (B, C, H, W).

    ``rows`` (B,) are the images' row numbers in the dataset. The noise of an image depends on
    (``key``, row) only, so it is the same for any number of ranks.
    """
    pixels = images[0].numel()
    halves = hash64(key, rows).view(np.int32).reshape(-1, 2)
    first, second = torch.from_numpy(halves).to(images.device, non_blocking=True).unbind(1)
    bits = torch.arange(pixels, dtype=torch.int32, device=images.device)
    bits = bits.expand(len(images), pixels) ^ first[:, None]
    bits = _mix(bits).add_(second[:, None])
    noise = _mix(bits).to(torch.float32).mul_(2.0**-31)
    # Pixels are numbered in channels-last memory order, so that no data are copied.
    batch, channels, height, width = images.shape
    return noise.view(batch, height, width, channels).permute(0, 3, 1, 2).to(images.dtype)


def _mix(bits: Tensor) -> Tensor:
    """Hash 32-bit integers in place ("lowbias32", C. Wellons, Hash Prospector, 2018)."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
