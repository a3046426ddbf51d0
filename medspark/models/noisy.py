"""Layers whose weights are noisy in every pass, by a scale per channel that is learnt.

Parametric noise injection (He et al. 2019), channel-wise as in Robust Sparse Regularization (Rakin
et al. 2019): a pass computes with w + scale * std(w) * n, where n is standard normal and drawn
anew for every pass, std(w) is the deviation of the layer's weights, and there is one scale per
output channel. Weights that are zero get no noise, so that a pruned layer stays sparse.

The published networks keep the noise when they are deployed. Gradients of such a network are
random, so attacks on it have to average over draws: see ``medspark.evaluate.noisy``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.masks import prunable, wide_layers

__all__ = ["NOISE", "add_noise", "noisy_layers", "plain_layers", "silent"]

# The name of the scale, a parameter (out channels,) of each noisy layer.
NOISE = "noise"


class _Noisy(nn.Module):
    weight: Any
    noise: nn.Parameter
    silent = False

    def drawn(self) -> Tensor:
        """Return the weight with the noise of one pass."""
        weight: Tensor = self.weight
        if self.silent:
            return weight
        # The draw is a constant to autograd: the gradient of a scale is the sum over its channel
        # of the weights' gradients times their draws.
        fixed = weight.detach()
        draw = _normal_like(fixed).mul_(fixed.std()).masked_fill_(fixed == 0, 0.0)
        return torch.addcmul(weight, self.noise.view(-1, *[1] * (fixed.ndim - 1)), draw)


def _normal_like(weight: Tensor) -> Tensor:
    """Return standard normal numbers in the shape and the memory layout of ``weight``.

    torch.randn_like takes seven times as long on a CPU where the layout is channels last.
    """
    drawn = torch.randn(weight.numel(), dtype=weight.dtype, device=weight.device)
    return drawn.as_strided(weight.shape, torch.empty_like(weight).stride())


class NoisyConv2d(_Noisy, nn.Conv2d):
    """A convolution with noisy weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` (B, C, H, W)."""
        output: Tensor = self._conv_forward(input, self.drawn(), self.bias)
        return output


class NoisyLinear(_Noisy, nn.Linear):
    """A linear layer with noisy weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with ``input`` (B, C)."""
        return F.linear(input, self.drawn(), self.bias)


_NOISY: dict[type[nn.Module], type[_Noisy]] = {nn.Conv2d: NoisyConv2d, nn.Linear: NoisyLinear}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {noisy: plain for plain, noisy in _NOISY.items()}


def add_noise(model: nn.Module, scale: float) -> list[str]:
    """Make every prunable layer of ``model`` noisy, in place; return the layers' names.

    Weights and their names stay; the scales start at ``scale``. Where an output has few inputs
    (``masks.wide_layers``), as in depthwise convolutions, they are zero and are not learnt: with
    noise of .25 there, too, MobileNet-V2's accuracy on X-rays fell from .96 to .72. Raises
    TypeError that names a layer whose class computes something of its own.
    """
    names = [name.removesuffix(".weight") for name in prunable(model)]
    wide = {name.removesuffix(".weight") for name in wide_layers(prunable(model))}
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) not in _NOISY:
            raise TypeError(
                f"the layer {name} is a {type(layer).__name__}, which has no noisy form"
            )
    for name in names:
        layer = model.get_submodule(name)
        layer.__class__ = _NOISY[type(layer)]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        first = torch.full((len(weight),), scale if name in wide else 0.0, device=weight.device)
        layer.register_parameter(NOISE, nn.Parameter(first, requires_grad=name in wide))
    return names


def plain_layers(model: nn.Module) -> None:
    """Make every noisy layer of ``model`` plain, in place, without its scale."""
    for layer in noisy_layers(model):
        del layer.noise
        layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]


def noisy_layers(model: nn.Module) -> list[_Noisy]:
    """Return the noisy layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _Noisy)]


@contextmanager
def silent(model: nn.Module) -> Iterator[nn.Module]:
    """Compute without noise within this context."""
    layers = noisy_layers(model)
    for layer in layers:
        layer.silent = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.silent = False
