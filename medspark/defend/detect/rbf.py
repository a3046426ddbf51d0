"""The kernel of the support vector machines among the detectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rbf_kernel"]


def rbf_kernel(values: Tensor, vectors: Tensor, gamma: float) -> Tensor:
    """Return exp(-gamma * squared distance) between rows (B, D) and (V, D), as (B, V)."""
    sizes = values.square().sum(1)[:, None] + vectors.square().sum(1)[None]
    squares = (sizes - 2 * values @ vectors.T).clamp_min(0)
    return torch.exp(-gamma * squares)
