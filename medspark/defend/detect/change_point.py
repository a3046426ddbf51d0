"""The (k, p) metric of the principal components of a single image (Jere et al. 2019).

An image (C, H, W) is a matrix of H rows and W C columns. Its components are removed one by one, the
smallest first. k is the largest rank at which the prediction differs from that of the whole image,
0 if it never does; p is the probability of the whole image's class at rank k + 1. (Jere et al.
count the components that the class needs, which is our k + 1.) ``answer`` is the class predicted
at rank k, the defence of Gupte et al. 2022 (CBMM Memo 135).

``centred`` subtracts the mean row before the decomposition, as principal component analysis does;
Gupte et al. leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medspark.attacks.components import Components

__all__ = [
    "CENTRED", "UNCENTRED", "ChangePoint", "change_point", "second_answer", "soft_change_point",
]  # fmt: skip


# Names of the two conventions, among the names of layers.
UNCENTRED, CENTRED = "uncentred", "centred"


@dataclass(frozen=True)
class ChangePoint:
    """k (B,), p (B,) and the class predicted at rank k (B,), the final class if k is 0."""

    k: Tensor
    p: Tensor
    answer: Tensor

    @property
    def features(self) -> Tensor:
        """k and p as the features (B, 2) of a detector."""
        return torch.stack([self.k.to(self.p.dtype), self.p], dim=1)


@torch.no_grad()
def change_point(model: nn.Module, images: Tensor, logits: Tensor, *, centred: bool) -> ChangePoint:
    """Return (k, p) and the answer of each image; ``logits`` are those of the whole images.

    The cost is up to min(H, W C) - 1 passes; an image needs no more passes once its prediction
    has changed.
    """
    parts = Components.of(images, centred=centred)
    final = logits.argmax(1)
    k, answer = torch.zeros_like(final), final.clone()
    p = logits.softmax(1).gather(1, final[:, None])[:, 0]
    held = torch.arange(len(images), device=images.device)
    for rank in range(parts.count - 1, 0, -1):
        lower = model(parts.image(rank))
        changed = lower.argmax(1) != final[held]
        k[held[changed]], answer[held[changed]] = rank, lower.argmax(1)[changed]
        likely = lower.softmax(1).gather(1, final[held][:, None])[:, 0]
        held, likely, parts = held[~changed], likely[~changed], parts.of_images(~changed)
        p[held] = likely
        if len(held) == 0:
            break
    return ChangePoint(k, p, answer)


def soft_change_point(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    *,
    centred: bool,
    ranks: int = 32,
    temperature: float = 0.25,
) -> Tensor:
    """Return differentiable (k, p), (B, 2), from at most ``ranks`` ranks; for attacks only.

    At each rank the prediction has changed with probability sigmoid(-margin / ``temperature``).
    k and p are expected values over the rank at which that happens first.
    """
    parts = Components.of(images.detach(), centred=centred)
    final = logits.argmax(1)
    p = logits.softmax(1).gather(1, final[:, None])[:, 0]
    stays, soft_k, soft_p = torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for rank in _spread(parts.count - 1, ranks):
        lower = model(parts.projected(images, rank))
        own = lower.gather(1, final[:, None])[:, 0]
        other = lower.scatter(1, final[:, None], -torch.inf).amax(1)
        changes = stays * torch.sigmoid((other - own) / temperature)
        soft_k, soft_p = soft_k + changes * rank, soft_p + changes * p
        stays = stays - changes
        p = lower.softmax(1).gather(1, final[:, None])[:, 0]
    return torch.stack([soft_k, soft_p + stays * p], dim=1)


def second_answer(logits: Tensor) -> Tensor:
    """Return the second most probable class (B,): the baseline of the defence."""
    return logits.topk(2, dim=1).indices[:, 1]


def _spread(largest: int, count: int) -> list[int]:
    """Return up to ``count`` ranks between ``largest`` and 1, falling."""
    if largest <= count:
        return list(range(largest, 0, -1))
    steps = torch.linspace(largest, 1, count).round().to(torch.int64)
    return [int(rank) for rank in steps]
