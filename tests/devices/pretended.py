"""A pretended device: code that breaks on a GPU also breaks on this device, without a GPU.

Tensors on it say that they are elsewhere and compute here, with the same numbers. An operation that
mixes them with tensors of the CPU is refused as CUDA refuses it, and so is ``numpy()``. ``waits``
lists the operations for which the host would wait for a GPU. Kernels and their rounding cannot be
pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["pretended_device", "register", "waits"]

if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
    raise ImportError(f"torch {torch.__version__} knows no devices that are written in Python")

aten = torch.ops.aten
_PLACED = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# The size or the value of the result is read from the device: item(), float(), bool(), ...
_READ = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default),
}
_HEARD: list[list[str]] = []
# Operations that autocast computes in bf16, as far as medspark's networks use them.
_HALVED = [aten.conv2d.default, aten.linear.default]


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Yield the device, and check all operations meanwhile."""
    register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) is seen
    try:
        with _Watch():
            yield torch.device("pretended", 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yield a list that gets the name of each operation for which the host would wait for a GPU.

    These read values from the device, or copy from the host without ``non_blocking``.
    """
    heard: list[str] = []
    _HEARD.append(heard)
    try:
        yield heard
    finally:
        _HEARD.remove(heard)


class _Elsewhere(Tensor):
    """A tensor of the device; ``inner`` is the tensor on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="pretended:0",
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"pretended {self.inner!r}"

    def tolist(self) -> Any:
        _tell("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert pretended:0 device type tensor to numpy")


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of ``func``, on the device if the operation ran there."""
    flat, shape = tree.tree_flatten((args, kwargs))
    wrappers = {id(t.inner): t for t in flat if isinstance(t, _Elsewhere)}
    _refuse_mixed(func, args, flat)
    asked = kwargs.get("device")
    if asked is not None:
        elsewhere = torch.device(asked).type == "pretended"
    elif func in _PLACED | _INDEXED:
        elsewhere = isinstance(args[0], _Elsewhere)
    else:
        elsewhere = bool(wrappers)
    plain = [t.inner if isinstance(t, _Elsewhere) else t for t in flat]
    if _must_wait(func, args, kwargs, flat, elsewhere):
        _tell(func.name())
    args, kwargs = tree.tree_unflatten(plain, shape)
    found = func(*args, **(kwargs if asked is None else {**kwargs, "device": "cpu"}))
    if not elsewhere:
        return found

    def placed(t: Tensor) -> Tensor:
        return wrappers[id(t)] if id(t) in wrappers else _Elsewhere(t)

    return tree.tree_map_only(Tensor, placed, found)


def _must_wait(func: Any, args: Any, kwargs: Any, flat: list[Any], elsewhere: bool) -> bool:
    there = any(isinstance(t, _Elsewhere) for t in flat)
    if func in _INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return there and bool(masks)
    if func not in _PLACED:
        return there and func in _READ
    source = args[1] if func is aten.copy_.default else args[0]
    if isinstance(source, _Elsewhere):
        return not elsewhere  # to the host
    asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
    return elsewhere and not asynchronous


def _tell(name: str) -> None:
    for heard in _HEARD:
        heard.append(name)


def _refuse_mixed(func: Any, args: Any, flat: list[Any]) -> None:
    """Raise RuntimeError where CUDA would: numbers (0-dimensional) may come along, mostly."""
    if func in _PLACED:
        return
    if func in _INDEXED:
        own, indices, *rest = args
        # Indices may come from the CPU, but not to it; values have to be where they are put.
        flat = [own, *rest] if isinstance(own, _Elsewhere) else [own, *indices, *rest]
    tensors = [t for t in flat if isinstance(t, Tensor)]
    here = [t for t in tensors if not isinstance(t, _Elsewhere)]
    several = "_foreach" in func.name() or "_fused" in func.name()
    if len(here) < len(tensors) and any(t.ndim > 0 or several for t in here):
        raise RuntimeError(f"{func} expected all tensors to be on the same device")


@cache
def register() -> None:
    """Register the device with torch; a process can have one such device."""
    registration._setup_privateuseone_for_python_backend("pretended", backend_module=_Module())
    _library("_").fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for operator in _HALVED:
        _library("aten").impl(operator.name()[6:], _halved(operator), "AutocastPrivateUse1")


class _Module(registration._DummyBackendModule):
    def device_count(self) -> int:
        return 0  # its random numbers are the CPU's: there is no state of its own to keep

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def _library(namespace: str) -> Any:
    return torch.library.Library(namespace, "IMPL")  # kept: collected, it takes its kernels back


def _halved(operator: Any) -> Any:
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*tree.tree_map_only(Tensor, lambda t: t.to(torch.bfloat16), args))

    return cast
