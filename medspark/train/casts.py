"""Weights cast to the precision of the passes, once for all passes that a step makes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["cast_once", "same_weights"]

# The version that torch counts for a tensor does not tell whether it has changed: the fused AdamW
# leaves it as it is.
_CASTS: ContextVar[dict[tuple[nn.Module, torch.dtype], Tensor] | None] = ContextVar(
    "casts", default=None
)


@contextmanager
def same_weights(device: str) -> Iterator[None]:
    """Have each weight cast once for all passes within; none may change before it ends."""
    token = _CASTS.set({})
    try:
        # Autocast keeps its casts until the outermost one ends, though that one casts nothing.
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _CASTS.reset(token)


def cast_once(
    module: nn.Module, dtype: torch.dtype, cast: Callable[[torch.dtype], Tensor]
) -> Tensor:
    """Return what ``cast`` makes of the weight of ``module``, without gradient."""
    casts = _CASTS.get()
    if casts is None:
        return cast(dtype)
    if (module, dtype) not in casts:
        casts[module, dtype] = cast(dtype)
    return casts[module, dtype]
