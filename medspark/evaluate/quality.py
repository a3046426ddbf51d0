"""How near two images are: peak signal-to-noise ratio, and structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["psnr", "ssim"]

# Equal images have no finite ratio; this is that of a change of 1e-5, far below a grey level.
_HIGHEST = 100.0
_WINDOW, _SIGMA = 11, 1.5  # in pixels
_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the ratio in dB for each image (B,), at most 100, for pixels in [0, 1]."""
    error = (images - originals).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(1e-30).log10()).clamp(max=_HIGHEST)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004) for each image (B,), at most 1.

    The window is Gaussian with a deviation of 1.5 pixels, 11 pixels wide, or as wide as the image;
    only windows inside the image count. Channels are averaged.
    """
    side = min(_WINDOW, *images.shape[2:])
    places = torch.arange(side, dtype=images.dtype, device=images.device) - (side - 1) / 2
    line = torch.exp(-places.square() / (2 * _SIGMA**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        channels = values.shape[1]
        return F.conv2d(values, window.expand(channels, 1, -1, -1), groups=channels)

    x, y = mean(images), mean(originals)
    variance = mean(images.square()) + mean(originals.square()) - x.square() - y.square()
    covariance = mean(images * originals) - x * y
    light = (2 * x * y + _K1**2) / (x.square() + y.square() + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance + _K2**2)
    return (light * structure).flatten(1).mean(1)
