"""Cast each weight to the precision of the passes once per step, not once per pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["as_autocast", "cast_once", "cast_weights_once"]

Form = Callable[[Tensor], Tensor]

# Torch's version counter of a tensor cannot detect changes: the fused AdamW does not increase it.
_CASTS: ContextVar[dict[tuple[Tensor, torch.dtype, Form | None], Tensor] | None] = ContextVar(
    "casts", default=None
)


@contextmanager
def cast_weights_once(device: str, *, autocast: bool = True) -> Iterator[None]:
    """Cast each weight only once within this context; no weight may change within it.

    ``autocast`` states whether torch's autocast is used within it.
    """
    token = _CASTS.set({})
    try:
        # Autocast keeps its casts until the outermost context ends, even a disabled one.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            yield
    finally:
        _CASTS.reset(token)


def cast_once(weight: Tensor, dtype: torch.dtype, form: Form | None = None) -> Tensor:
    """Return ``weight`` as ``dtype``, detached, and transformed by ``form`` if given."""
    casts = _CASTS.get()
    if casts is not None and (weight, dtype, form) in casts:
        return casts[weight, dtype, form]
    cast = weight.detach().to(dtype)
    cast = cast if form is None else form(cast)
    if casts is not None:
        casts[weight, dtype, form] = cast
    return cast


def as_autocast(input: Tensor) -> Tensor:
    """Return ``input`` in the precision of torch's autocast on its device, if that is on."""
    device = input.device.type
    return (
        input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
    )
