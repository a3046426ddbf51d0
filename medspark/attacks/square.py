"""Square attack (Andriushchenko et al. 2020): random search without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct, margin

# A square covers this share of the image at first, halved at each of these shares of the queries.
_FIRST_SHARE = 0.8
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    rng: KeyedRandom,
    queries: int = 1000,
) -> Tensor:
    """Return images within ``eps`` of ``images`` in L-infinity that fool ``model``, if found.

    It uses logits only, so it works on a model without gradients. The search stops for an image as
    soon as it fools the model. (The result is within ``eps`` in root mean square too, so both norms
    of a ThreatModel allow it.)
    """
    found = images.clone()
    stripes = rng.noise(images[:, :, :1, :], "square/stripes")
    x = (images + eps * _signs(stripes)).clamp(0, 1)
    place = torch.arange(len(x), device=x.device)
    logits = _logits(model, x)
    for query in range(1, queries):
        fooled = ~correct(logits, labels)
        found[place[fooled]] = x[fooled]
        keep = ~fooled
        place, labels, rng = place[keep], labels[keep], rng.of(keep)
        x, images, logits = x[keep], images[keep], logits[keep]
        if len(place) == 0:
            return found
        tried = _paint(x, images, eps=eps, share=_share(query / queries), rng=rng, query=query)
        tried_logits = _logits(model, tried)
        better = margin(tried_logits, labels) > margin(logits, labels)
        x = torch.where(better.view(-1, 1, 1, 1), tried, x)
        logits = torch.where(better[:, None], tried_logits, logits)
    found[place] = x
    return found


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _share(done: float) -> float:
    return math.ldexp(_FIRST_SHARE, -sum(done > at for at in _HALVINGS))


def _paint(
    x: Tensor, images: Tensor, *, eps: float, share: float, rng: KeyedRandom, query: int
) -> Tensor:
    """Return ``x`` with one random square per image set to the clean pixels +-eps per channel."""
    channels, height, width = x.shape[1:]
    side = max(round((share * height * width) ** 0.5), 1)
    drawn = rng.numbers(2 + channels, f"square/{query}").to(x.device)
    top = (drawn[:, 0] * max(height - side + 1, 1)).floor().view(-1, 1, 1, 1)
    left = (drawn[:, 1] * max(width - side + 1, 1)).floor().view(-1, 1, 1, 1)
    down = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    across = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    inside = (down >= top) & (down < top + side) & (across >= left) & (across < left + side)
    moved = (images + eps * _signs(drawn[:, 2:].view(-1, channels, 1, 1))).clamp(0, 1)
    return torch.where(inside, moved, x)


def _signs(noise: Tensor) -> Tensor:
    return torch.where(noise < 0.5, -1.0, 1.0)
