"""Round the weights of a layer together, so that its outputs change least (Frantar et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rounded_together"]

_DAMPING = 0.01  # of the mean variance of the inputs, as published
_BLOCK = 128  # columns between two updates of all later ones


def rounded_together(exact: Tensor, covariance: Tensor, *, low: Tensor, high: Tensor) -> Tensor:
    """Return the weights ``exact`` (G, R, D), in steps of their grid, as whole numbers.

    The error that one weight makes is taken back by those that are rounded after it, as far as
    their inputs vary together: ``covariance`` (G, D, D) is that of the inputs. This is GPTQ
    (Frantar et al. 2023), for G groups at once. Results are from ``low`` to ``high`` (G, R, D).
    """
    order = torch.diagonal(covariance, dim1=1, dim2=2).argsort(dim=1, descending=True)
    weights, low, high = (_ordered(each, order) for each in (exact, low, high))
    factors = _factors(covariance, order).to(exact.dtype)
    found = torch.empty_like(weights)
    count = weights.shape[2]
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        errors = torch.empty_like(weights[:, :, first:last])
        for at in range(first, last):
            found[:, :, at] = weights[:, :, at].round().clamp(low[:, :, at], high[:, :, at])
            error = (weights[:, :, at] - found[:, :, at]) / factors[:, at, at, None]
            weights[:, :, at:last] -= error[:, :, None] * factors[:, None, at, at:last]
            errors[:, :, at - first] = error
        weights[:, :, last:] -= errors @ factors[:, first:last, last:]
    return _ordered(found, order.argsort(dim=1))


def _ordered(weights: Tensor, order: Tensor) -> Tensor:
    """Return ``weights`` (G, R, D) with their columns in ``order`` (G, D)."""
    return weights.gather(2, order[:, None].expand_as(weights))


def _factors(covariance: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factors (G, D, D) of the inverse of the damped covariance."""
    damped = covariance.double()
    mean = torch.diagonal(damped, dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    damped = damped + torch.diag_embed(_DAMPING * mean[:, None].expand(order.shape))
    damped = _ordered(_ordered(damped, order).mT, order)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factors: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factors
