"""The losses of a denoiser and of its contrastive detector.

The losses of Yin et al. (arXiv 2306.07992) could not be read. These are the published ones that fit
its description: the distance to the clean image, the high-level guidance of Liao et al. (2018), and
the supervised contrastive loss of Khosla et al. (2020).

Distances are squared. A denoiser begins by changing nothing, which is right for the clean half of a
batch; absolute distances, as Liao et al. have them, punish the first small change there as much as
they reward it on attacked images, and the denoiser never leaves its beginning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["guidance", "reconstruction", "supervised_contrast"]


def reconstruction(denoised: Tensor, clean: Tensor, *, eps: float) -> Tensor:
    """Return the mean squared distance in pixels, in units of ``eps`` squared."""
    return F.mse_loss(denoised, clean) / eps**2


def guidance(seen: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared distance (B, ...) relative to the mean square of ``wanted``.

    High-level guided denoising (Liao et al. 2018): what the classifier sees counts, not pixels.
    """
    return F.mse_loss(seen, wanted) / wanted.square().mean().clamp_min(1e-12)


def supervised_contrast(embeddings: Tensor, attacked: Tensor, *, temperature: float) -> Tensor:
    """Return the supervised contrastive loss of unit ``embeddings`` (B, E) in two classes.

    ``attacked`` (B,) is the class. An image that is alone in its class does not count; without any
    pair the loss is 0 (Khosla et al. 2020, equation 2, the mean outside of the logarithm).
    """
    similarity = embeddings @ embeddings.T / temperature
    self_pair = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    same = (attacked[:, None] == attacked[None]) & ~self_pair
    others = similarity.masked_fill(self_pair, -torch.inf)
    if len(embeddings) < 2:
        return 0 * embeddings.sum()
    log_share = similarity - torch.logsumexp(others, dim=1, keepdim=True)
    pairs = same.sum(1)
    losses = -(log_share * same).sum(1) / pairs.clamp_min(1)
    counted = (pairs > 0).to(losses.dtype)
    return (losses * counted).sum() / counted.sum().clamp_min(1)
