"""A network that serves many clients: its own form, and one that trains faster.

Clients exchange the parameters of the network as timm defines it. A pass is faster if frozen batch
norms are folded into the convolutions before them, and layers replaced by equal ones that a CPU
computes faster (``models/kernels``). So before a step the folded weights are computed from the
network's own: W' = s W and b' = beta + (b - mean) s, with r = 1 / sqrt(var + eps) and s = gamma r.
After the passes of the step their gradients are pulled back by the chain rule:

    dW = s dW'    db = s db'    dbeta = db'    dgamma = (<W, dW'> + (b - mean) db') r

This costs a few operations for each weight, not for each activation. The gradient is that of the
unfolded network but for rounding. All other parameters, and the statistics, are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from medspark.federate.local import LocalConfig
from medspark.federate.weights import NormPolicy, Tensors
from medspark.models.classifier import batch_norms
from medspark.models.kernels.fold_norm import Pairs, folded_copy
from medspark.models.kernels.lower import lower

__all__ = ["Resident"]

# Logits of the two forms may differ by rounding only.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Resident:
    """``own``, whose parameters are exchanged, and ``trained``, which computes passes.

    ``folded`` are the convolution and the batch norm of ``own``, and the convolution of ``trained``
    into which both are folded.
    """

    own: nn.Module
    trained: nn.Module
    folded: tuple[tuple[Any, Any, Any], ...] = ()
    _tensors: dict[NormPolicy, Tensors] = field(default_factory=dict, compare=False, repr=False)

    def tensors(self, policy: NormPolicy) -> Tensors:
        """Return the tensors of ``own`` that clients exchange, and the others."""
        if policy not in self._tensors:
            self._tensors[policy] = Tensors.of(self.own, policy)
        return self._tensors[policy]

    @cached_property
    def learning(self) -> list[nn.Parameter]:
        """The parameters of ``own`` that are trained."""
        return [p for p in self.own.parameters() if p.requires_grad]

    @cached_property
    def norms(self) -> list[nn.Module]:
        """The batch norms of ``trained``."""
        return list(batch_norms(self.trained))

    @classmethod
    def of(cls, model: nn.Module | Self) -> Self:
        """Return ``model`` as a resident network; one that is not prepared trains as it is."""
        return model if isinstance(model, cls) else cls(model, model)  # type: ignore[arg-type]

    @classmethod
    def prepared(cls, model: nn.Module, shape: tuple[int, int, int], config: LocalConfig) -> Self:
        """Return ``model`` with its faster form, for images of a ``shape`` (C, H, W).

        Batch norms are folded where their statistics stay fixed while a client trains. ``model`` is
        not to be used by anybody else: its memory layout changes.
        """
        images = torch.zeros(2, *shape)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = None
        if config.batch_norm in ("frozen", "reestimate"):
            found = folded_copy(model, images, tolerance=_TOLERANCE)
        if found is None:
            lower(model, images, batch_size=config.batch_size)
            return cls(model, model)
        trained, pairs = found
        _share(model, trained, pairs)
        lower(trained, images, batch_size=config.batch_size)
        find, fast = model.get_submodule, trained.get_submodule
        folded = tuple((find(c), find(n), fast(c)) for c, n in pairs)
        for _, _, conv in folded:
            conv.requires_grad_(True)  # for the norm's gradients, even if the weights stay fixed
        return cls(model, trained, folded)

    def fold(self) -> None:
        """Compute the folded weights from the network's own."""
        # Without folded norms this costs nothing: a step of a small network is short.
        if self.folded:
            self._fold()

    def pull_back(self) -> None:
        """Move the gradients of the folded weights to the network's own parameters."""
        if self.folded:
            self._pull_back()

    @torch.no_grad()
    def _fold(self) -> None:
        for conv, norm, folded in self.folded:
            folded.weight.grad = folded.bias.grad = None
            _, scale, shift = _factors(conv, norm)
            torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=folded.weight)
            torch.mul(shift, scale, out=folded.bias)
            if norm.bias is not None:
                folded.bias.add_(norm.bias)

    @torch.no_grad()
    def _pull_back(self) -> None:
        for conv, norm, folded in self.folded:
            for_weight, for_bias = folded.weight.grad, folded.bias.grad
            if for_weight is None or for_bias is None:
                continue
            root, scale, shift = _factors(conv, norm)
            if norm.weight is not None:
                along = (conv.weight * for_weight).sum((1, 2, 3))
                _add(norm.weight, (along + shift * for_bias) * root)
            if norm.bias is not None:
                _add(norm.bias, for_bias)
            if conv.bias is not None:
                _add(conv.bias, for_bias * scale)
            _add(conv.weight, for_weight.mul_(scale.view(-1, 1, 1, 1)))


def _factors(conv: Any, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 / sqrt(var + eps), gamma / sqrt(var + eps), and b - mean, each (C,)."""
    root = torch.rsqrt(norm.running_var + norm.eps)
    scale = root if norm.weight is None else norm.weight * root
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    return root, scale, shift


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is not None:
        parameter.grad = parameter.grad + gradient
        return
    # The fused optimiser takes gradients to be laid out as their parameters.
    same = gradient.stride() == parameter.stride()
    parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)


def _share(own: nn.Module, trained: nn.Module, pairs: Pairs) -> None:
    """Give ``trained`` the parameters and buffers of ``own``, except those that are folded."""
    folded = {f"{conv}.{name}" for conv, _ in pairs for name in ("weight", "bias")}
    for name, _ in [*trained.named_parameters(), *trained.named_buffers()]:
        if name not in folded:
            place, _, last = name.rpartition(".")
            there, here = trained.get_submodule(place), own.get_submodule(place)
            setattr(there, last, getattr(here, last))
