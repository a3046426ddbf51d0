"""Adversarial weight perturbation (AWP; Wu, Xia and Wang 2020): learn at weights that are worse.

A step takes its passes, the attack included, at moved weights: each weight tensor W moves by
gamma * |W| / |G| * G up the loss. Then the weights are restored, bit for bit, and updated with the
gradient that was found. A flatter loss makes robustness carry over to new images.

The paper takes G from one more pass of the attacked images. Here G is the gradient of the update
before: the sum over the whole global batch that all ranks have anyway. So a step costs no further
pass and no further communication, and all ranks move alike. The price is that G is one update old
and of other images, except in mode free, which replays a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightPerturbation"]

_GRADIENT = "awp/"


class WeightPerturbation:
    """Moves the weights of ``model`` for the passes of a step, and back."""

    def __init__(
        self, model: nn.Module, *, gamma: float, begins: int, keep_zeros: bool = False
    ) -> None:
        """``gamma`` is the length of each move, relative to the weight's norm; 0 moves nothing.

        The first move is in update ``begins``. With ``keep_zeros``, weights that are exactly zero
        stay so: they are pruned.
        """
        self._gamma, self._begins, self._keep_zeros = gamma, begins, keep_zeros
        self._weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and name.rpartition(".")[2] == "weight"
        }
        self._gradients: dict[str, Tensor] = {}

    @contextmanager
    def moved(self, update: int) -> Iterator[None]:
        """Move the weights within this context, if it is of an ``update`` late enough."""
        if self._gamma == 0 or update < self._begins or not self._gradients:
            yield
            return
        weights = [self._weights[name] for name in self._gradients]
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            self._move(weights, list(self._gradients.values()))
        try:
            yield
        finally:
            # Copied, not subtracted: a sum and its difference do not cancel to the bit.
            with torch.no_grad():
                torch._foreach_copy_([*weights], kept)

    def remember(self, update: int) -> None:
        """Keep the gradient of ``update`` for the next one; call it when ``.grad`` is complete."""
        if self._gamma == 0 or update + 1 < self._begins:
            return
        self._gradients = {
            name: weight.grad.nan_to_num(0.0, 0.0, 0.0)
            for name, weight in self._weights.items()
            if weight.grad is not None
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs, by name."""
        return {f"{_GRADIENT}{name}": gradient for name, gradient in self._gradients.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors that ``tensors`` returned."""
        self._gradients = {
            name: torch.empty_like(weight).copy_(tensors[f"{_GRADIENT}{name}"])
            for name, weight in self._weights.items()
            if f"{_GRADIENT}{name}" in tensors
        }

    def _move(self, weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
        sizes = torch.stack(torch._foreach_norm([*weights]))
        slopes = torch.stack(torch._foreach_norm(gradients))
        lengths = torch.where(slopes > 0, self._gamma * sizes / slopes, 0.0).unbind()
        for weight, gradient, length in zip(weights, gradients, lengths, strict=True):
            if self._keep_zeros:
                gradient = torch.where(weight == 0, 0.0, gradient)
            weight.addcmul_(gradient, length)
