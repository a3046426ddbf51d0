"""A3FL: a trigger that still works on a network which has unlearnt it (Zhang et al. 2023)."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from medspark.federate.adversary.adversary import Known
from medspark.federate.adversary.badnets import BadNets

if TYPE_CHECKING:  # reading and checking the configuration must not import torch
    from torch import Tensor, nn

__all__ = ["A3FL"]


class A3FL(BadNets):
    """BadNets whose pattern is adapted to the round's network, and to its likely answer.

    The pattern lowers L(x + t, target; w) + balance cos(w, w') L(x + t, target; w'), where w' has
    been trained to tell stamped images right.
    """

    size: int = Field(5, ge=1, description="side of the trigger, in pixels")
    poisoned: float = Field(0.25, ge=0, le=1, description="share of the images that are stamped")
    steps: int = Field(200, ge=1, description="steps of the search for the pattern")
    step_length: float = Field(0.01, gt=0, description="of the search, in pixel units")
    balance: float = Field(0.01, ge=0, description="weight of the network that has unlearnt it")
    refresh: int = Field(10, ge=1, description="steps between unlearning the pattern of that time")
    unlearn_steps: int = Field(5, ge=1, description="steps of SGD that unlearn a pattern")
    unlearn_rate: float = Field(0.01, gt=0, description="learning rate of unlearning")

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor, known: Known) -> Known:
        """Return ``known`` with an adapted pattern; it starts from the last one, or from grey."""
        import torch
        import torch.nn.functional as F

        whole, start = self.whole(), known.pattern
        pattern = images.new_full((images.shape[1], self.size, self.size), 0.5)
        pattern = (pattern if start is None else start).clone().requires_grad_(True)
        victim = copy.deepcopy(model).eval()
        target = torch.full_like(labels, self.target)
        for step in range(self.steps):
            if step % self.refresh == 0:
                hard = self._unlearn(victim, images, labels, pattern.detach())
                alike = _cosine(victim, hard)
            stamped = self.stamp(images, whole, pattern)
            loss = F.cross_entropy(victim(stamped), target)
            loss = loss + self.balance * alike * F.cross_entropy(hard(stamped), target)
            (gradient,) = torch.autograd.grad(loss, pattern)
            moved = pattern.detach() - self.step_length * gradient.sign()
            pattern = moved.clamp(0, 1).requires_grad_(True)
        return replace(known, pattern=pattern.detach())

    def _unlearn(
        self, model: nn.Module, images: Tensor, labels: Tensor, pattern: Tensor
    ) -> nn.Module:
        """Return ``model`` after it was trained to tell stamped images right."""
        import torch
        import torch.nn.functional as F

        hard = copy.deepcopy(model)
        optimiser = torch.optim.SGD(hard.parameters(), lr=self.unlearn_rate, momentum=0.9)
        stamped = self.stamp(images, self.whole(), pattern)
        for _ in range(self.unlearn_steps):
            optimiser.zero_grad()
            F.cross_entropy(hard(stamped), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return hard


def _cosine(one: nn.Module, other: nn.Module) -> float:
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    inner = sum(float((a.detach() * b.detach()).sum()) for a, b in pairs)
    return inner / (_norm(one) * _norm(other))


def _norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
