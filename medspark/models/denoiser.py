"""A denoiser of attacked images: a small vision transformer that predicts what to subtract.

Yin et al. (arXiv 2306.07992) describe a denoiser built on a global vision transformer, against
local perturbations, but its layers could not be read. This is a reconstruction: every patch of the
image attends to every other one, and a convolution applies what they found to the pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.card import DenoiserShape

__all__ = ["ContrastHead", "Denoiser"]

# Details of an image, and what is subtracted from it, are computed in units of 8/255: attacks are
# thousandths of the range of pixels, and a network learns such small numbers slowly.
_SCALE = 255 / 8


class Block(nn.Module):
    """A transformer block, normalised first (Xiong et al. 2020): global attention, then an MLP.

    It has no operation that depends on the batch size, so that the exported graph is simple.
    """

    def __init__(self, count: int, width: int, heads: int) -> None:
        super().__init__()
        self._split = (-1, count, heads, width // heads)
        self._joined = (-1, count, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B, N, D) after attention among all of them."""
        seen = self.norm1(tokens)
        query, key, value = (
            layer(seen).reshape(self._split).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attention = (query @ key.transpose(2, 3) / self._split[-1] ** 0.5).softmax(3)
        mixed = (attention @ value).transpose(1, 2).reshape(self._joined)
        tokens = tokens + self.project(mixed)
        found: Tensor = tokens + self.mlp(self.norm2(tokens))
        return found


class Denoiser(nn.Module):
    """Images (B, C, H, W) in [0, 1] to cleaner ones of the same size and range.

    The last layer begins with zeros, so that an untrained denoiser changes nothing. ``size`` is
    (H, W) in pixels.
    """

    def __init__(self, shape: DenoiserShape, *, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.size = shape, size
        patch = _each(size, lambda side: -(-side // shape.grid))
        self.grid = -(-size[0] // patch[0]), -(-size[1] // patch[1])
        # Patches reach beyond the image where they do not divide it.
        beyond = self.grid[0] * patch[0] - size[0], self.grid[1] * patch[1] - size[1]
        around, odd = _each(beyond, lambda b: -(-b // 2)), _each(beyond, lambda b: b % 2)
        count, width = self.grid[0] * self.grid[1], shape.width
        self.stem = nn.Conv2d(2 * channels, shape.stem, 3, padding=1)
        self.embed = nn.Conv2d(shape.stem, width, patch, stride=patch, padding=around)
        self.position = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.blocks = nn.Sequential(*[Block(count, width, shape.heads) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(shape.width)
        self.expand = nn.ConvTranspose2d(
            width, shape.stem, patch, stride=patch, padding=around, output_padding=odd
        )
        self.mix = nn.Conv2d(shape.stem, shape.stem, 3, padding=1)
        self.head = nn.Conv2d(shape.stem, channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the denoised images (B, C, H, W), in [0, 1] and in the type of ``images``."""
        smooth = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        local = F.gelu(self.stem(torch.cat([images, _SCALE * (images - smooth)], dim=1)))
        mixed = F.gelu(self.mix(local + self._context(local)))
        denoised: Tensor = (images - self.head(mixed) / _SCALE).clamp(0.0, 1.0)
        return denoised

    def _context(self, local: Tensor) -> Tensor:
        """Return for each pixel what the attention among all patches found, like ``local``."""
        count, width = self.position.shape[1:]
        patches = self.embed(local).reshape(-1, width, count).transpose(1, 2)
        tokens = self.norm(self.blocks(patches + self.position)).transpose(1, 2)
        found: Tensor = self.expand(tokens.reshape(-1, width, *self.grid))
        return found


def _each(pair: tuple[int, int], what: Callable[[int], int]) -> tuple[int, int]:
    return what(pair[0]), what(pair[1])


class ContrastHead(nn.Module):
    """Unit embeddings (B, E) of images, from an image and what the denoiser subtracts from it.

    Supervised contrastive learning (Khosla et al. 2020) pulls clean images together and attacked
    ones away from them.
    """

    def __init__(self, shape: DenoiserShape, *, channels: int) -> None:
        super().__init__()
        stem = shape.stem
        self.layers = nn.Sequential(
            *[nn.Conv2d(2 * channels, stem, 3, stride=2, padding=1), nn.GELU()],
            *[nn.Conv2d(stem, 2 * stem, 3, stride=2, padding=1), nn.GELU()],
            *[nn.Conv2d(2 * stem, 4 * stem, 3, stride=2, padding=1), nn.GELU()],
            *[nn.AdaptiveAvgPool2d(1), nn.Flatten()],
            *[nn.Linear(4 * stem, 4 * stem), nn.GELU(), nn.Linear(4 * stem, shape.embedding)],
        )

    def forward(self, images: Tensor, denoised: Tensor) -> Tensor:
        """Return the embeddings of ``images`` (B, C, H, W), given their ``denoised`` versions."""
        seen = torch.cat([images, _SCALE * (images - denoised)], dim=1)
        return F.normalize(self.layers(seen).float(), dim=1)
