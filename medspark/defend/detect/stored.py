"""Images as files hold them: attacked images in whole grey levels, and noise of the same size.

A network's images are integers divided by 255 (or 65535), and those of an attack are not. A
detector that is shown both as they are learns to recognise integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.threat import ThreatModel, norms

__all__ = ["as_stored", "noise_like", "within_a_level"]


def as_stored(images: Tensor, clean: Tensor, *, threat: ThreatModel, bits: int) -> Tensor:
    """Return ``images`` in whole levels, inside ``threat`` around ``clean``.

    Levels are the nearest ones. An image that this takes out of the threat model is rounded towards
    the clean image instead.
    """
    levels: int = 2**bits - 1
    nearest = (images * levels).round() / levels
    steps = ((images - clean) * levels * (1 + 1e-6)).trunc()
    towards = ((clean * levels).round() + steps) / levels
    keep = threat.holds(nearest, clean).view(-1, 1, 1, 1)
    return torch.where(keep, nearest, towards).clamp(0, 1)


def noise_like(attacked: Tensor, clean: Tensor, rng: KeyedRandom, *, bits: int) -> Tensor:
    """Return ``clean`` plus Gaussian noise with the L2 norm of each image's attack, in levels."""
    levels: int = 2**bits - 1
    normal: Tensor = torch.special.ndtri(rng.noise(clean, "detect/noise").clamp(1e-6, 1 - 1e-6))
    size = norms(attacked - clean) / norms(normal).clamp_min(1e-12)
    noisy = (clean + size * normal).clamp(0, 1)
    return (noisy * levels).round() / levels


def within_a_level(clean: Tensor, rng: KeyedRandom, *, bits: int) -> Tensor:
    """Return images that differ from ``clean`` by less than half a level: the same as files."""
    levels: int = 2**bits - 1
    shift = 0.9 * (rng.noise(clean, "detect/level") - 0.5) / levels
    return (clean + shift).clamp(0, 1)
