"""Weights cast to the precision of the passes, once for all passes that a step makes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["cast_once", "cast_weights_once"]

Form = Callable[[Tensor], Tensor]

# The version that torch counts for a tensor does not tell whether it has changed: the fused AdamW
# leaves it as it is.
_CASTS: ContextVar[dict[tuple[Tensor, torch.dtype, Form | None], Tensor] | None] = ContextVar(
    "casts", default=None
)


@contextmanager
def cast_weights_once(device: str) -> Iterator[None]:
    """Have each weight cast once for all passes within; none may change before it ends."""
    token = _CASTS.set({})
    try:
        # Autocast keeps its casts until the outermost one ends, though that one casts nothing.
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _CASTS.reset(token)


def cast_once(weight: Tensor, dtype: torch.dtype, form: Form | None = None) -> Tensor:
    """Return ``weight`` as ``dtype``, in another form if one is given, without gradient."""
    casts = _CASTS.get()
    if casts is not None and (weight, dtype, form) in casts:
        return casts[weight, dtype, form]
    cast = weight.detach().to(dtype)
    cast = cast if form is None else form(cast)
    if casts is not None:
        casts[weight, dtype, form] = cast
    return cast
