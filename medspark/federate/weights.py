"""Pack a network into one vector of weights, with a policy for batch norm (``NormPolicy``).

A batch norm has parameters, which gradients update, and statistics, which they do not. Averaging
only the parameters gives a network that fits no client. So a policy decides:

    average       statistics are exchanged and averaged; the server's optimiser leaves them alone
    local         batch norms are not exchanged: each client keeps its own (FedBN, Li et al. 2021)
    frozen        statistics stay as given; parameters are exchanged and trained
    reestimate    parameters are exchanged; each user computes statistics from its own images
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medspark.federate.aggregate.rule import Vector
from medspark.federate.local import NormPolicy
from medspark.models.classifier import BATCH_NORMS, batch_norms

__all__ = [
    "NormPolicy",
    "Statistics",
    "Tensors",
    "Weights",
    "apply",
    "difference",
    "kept",
    "pack",
    "reestimate",
    "unpack",
]

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a network under a policy: those that are exchanged, and all others.

    Finding them takes longer than copying those of a small network, so they are found once.
    """

    exchanged: list[Tensor]
    private: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, policy: NormPolicy) -> Self:
        """Return the tensors of ``model``."""
        exchanged = _travels(model, policy)
        known = {id(tensor) for tensor in exchanged}
        every = (*model.parameters(), *model.buffers())
        return cls(exchanged, [tensor for tensor in every if id(tensor) not in known])

    def pack(self) -> Weights:
        """Return the exchanged tensors as one vector (d,)."""
        return _vector(self.exchanged)

    @torch.no_grad()
    def unpack(self, weights: Weights) -> None:
        """Set the exchanged tensors. Raises ValueError if ``weights`` do not fit them."""
        _fill(self.exchanged, weights)

    @contextmanager
    def private_restored(self) -> Iterator[None]:
        """Restore, at the end of this context, every tensor that is not exchanged."""
        given = [tensor.detach().clone() for tensor in self.private]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(self.private, given, strict=True):
                    tensor.copy_(values)


@dataclass(frozen=True)
class Statistics:
    """Which exchanged weights (d,) are statistics of batch norms, and which of them are variances.

    Statistics are averages, not weights that a gradient moves. So the server's optimiser leaves
    them alone: its momentum would carry variances below zero.
    """

    every: npt.NDArray[np.bool_]
    variances: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, model: nn.Module, policy: NormPolicy) -> Self:
        """Return those of ``model``; without any, both arrays are empty."""
        layers: list[Any] = list(batch_norms(model)) if policy == "average" else []
        every = {id(buffer) for layer in layers for buffer in _statistics(layer)}
        variances = {id(layer.running_var) for layer in layers}
        tensors = _travels(model, policy) if every else []
        return cls(_marks(tensors, every), _marks(tensors, variances))

    def averaged(self, moved: Vector, mean: Vector, here: slice) -> Vector:
        """Return the change (c,) ``here``: ``mean`` of statistics, ``moved`` of other weights."""
        return np.where(self.every[here], mean, moved) if len(self.every) else moved

    def apply(self, weights: Weights, change: Vector, here: slice) -> Weights:
        """Return the weights (c,) ``here`` after a change; a variance below zero stays as it was.

        An outcome that is no mean, as with noise or with clients that lie, may lead there.
        """
        after = apply(weights, change)
        if not len(self.variances):
            return after
        return np.where(self.variances[here] & ~(after >= 0), weights, after)


def pack(model: nn.Module, policy: NormPolicy) -> Weights:
    """Return the exchanged tensors of ``model`` as one vector (d,)."""
    return Tensors.of(model, policy).pack()


def unpack(model: nn.Module, weights: Weights, policy: NormPolicy) -> None:
    """Set the exchanged tensors of ``model``. Raises ValueError if ``weights`` do not fit it."""
    Tensors.of(model, policy).unpack(weights)


def kept(model: nn.Module, policy: NormPolicy) -> list[Tensor]:
    """Return the tensors of ``model`` that a client keeps private between rounds."""
    if policy != "local":
        return []
    return [
        tensor
        for layer in batch_norms(model)
        for tensor in (*layer.parameters(recurse=False), *_statistics(layer))
    ]


def pack_kept(model: nn.Module, policy: NormPolicy) -> Weights:
    """Return the private tensors of ``model`` as one vector."""
    return _vector(kept(model, policy))


@torch.no_grad()
def unpack_kept(model: nn.Module, values: Weights, policy: NormPolicy) -> None:
    """Set the private tensors of ``model`` to ``values`` from ``pack_kept``."""
    _fill(kept(model, policy), values)


def difference(trained: Weights, weights: Weights) -> Vector:
    """Return the update (d,) between two vectors of weights, in double precision.

    The difference is exact, so ``apply`` restores the trained weights bit for bit.
    """
    return np.subtract(trained, weights, dtype=np.float64)


def apply(weights: Weights, change: Vector) -> Weights:
    """Return the weights after a change, rounded once."""
    return np.add(weights, change, dtype=np.float64).astype(np.float32)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the statistics of all batch norms as the mean over ``batches`` of images."""
    layers: list[Any] = list(batch_norms(model))
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean of all batches
        layer.train()
    try:
        for images in batches:
            model(images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()


def _travels(model: nn.Module, policy: NormPolicy) -> list[Tensor]:
    norms = set(batch_norms(model))
    found: list[Tensor] = []
    for module in model.modules():
        if policy == "local" and module in norms:
            continue
        found += module.parameters(recurse=False)
        if policy == "average" and isinstance(module, BATCH_NORMS):
            found += _statistics(module)
    return found


def _statistics(layer: nn.Module) -> list[Tensor]:
    return [buffer for buffer in layer.buffers(recurse=False) if buffer.is_floating_point()]


def _marks(tensors: list[Tensor], chosen: set[int]) -> npt.NDArray[np.bool_]:
    parts = [np.full(tensor.numel(), id(tensor) in chosen) for tensor in tensors]
    return np.concatenate(parts) if parts else np.empty(0, dtype=bool)


def _vector(tensors: list[Tensor]) -> Weights:
    if not tensors:
        return np.empty(0, dtype=np.float32)
    flat = torch.cat([tensor.detach().float().flatten().cpu() for tensor in tensors])
    vector: Weights = flat.numpy()
    return vector


def _fill(tensors: list[Tensor], values: Weights) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    if len(values) != sum(sizes):
        raise ValueError(f"{len(values)} weights are not the {sum(sizes)} of this network")
    parts = torch.split(torch.from_numpy(values), sizes)
    torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])
