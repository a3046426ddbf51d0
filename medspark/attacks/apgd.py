"""Auto-PGD (Croce and Hein 2020, algorithm 1): PGD that adapts its step size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medspark.attacks.gradient import input_gradient
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import Loss, correct
from medspark.attacks.threat import ThreatModel

_MOMENTUM = 0.75
_RISING_SHARE = 0.75  # with fewer rises since the last checkpoint, the step size is halved


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    loss: Loss,
    rng: KeyedRandom,
    steps: int = 100,
) -> Tensor:
    """Return images inside ``threat`` that fool ``model``, or else have the highest loss found.

    The search stops for an image as soon as it fools the model, so the result measures accuracy,
    not the highest loss or confidence.
    """
    found = images.clone()
    start = threat.random_start(images, rng.noise(images, "apgd"))
    climb = _Climb.begin(model, images, labels, threat=threat, loss=loss, start=start)
    climb = climb.without_fooled(found)
    checkpoints = _checkpoints(steps)
    for step in range(1, steps + 1):
        if len(climb.place) == 0:
            return found
        climb.advance(model, threat, loss)
        # Before adapt, which may return an image to its best point, even if that fools nobody.
        climb = climb.without_fooled(found)
        if step in checkpoints:
            climb.adapt(checkpoints[step])
    found[climb.place] = climb.best
    return found


def _checkpoints(steps: int) -> dict[int, int]:
    """Return the steps at which the step size is adapted, with the steps since the last one."""
    period, least, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), int(0.03 * steps)
    at, found = 0, {}
    while at + period <= steps:
        at += period
        found[at] = period
        period = max(period - shrink, least)
    return found


@dataclass
class _Climb:
    """The state of the images that do not fool the model yet, with one row per image."""

    place: Tensor  # position of the image in the whole batch
    clean: Tensor
    labels: Tensor
    current: Tensor
    previous: Tensor
    gradient: Tensor  # at current
    fooled: Tensor  # whether current fools the model
    loss: Tensor  # at current
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    step: Tensor  # (B, 1, 1, 1), in pixel units
    rises: Tensor  # since the last checkpoint
    best_at_checkpoint: Tensor
    halved: Tensor  # at the last checkpoint

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        clean: Tensor,
        labels: Tensor,
        *,
        threat: ThreatModel,
        loss: Loss,
        start: Tensor,
    ) -> _Climb:
        gradient, logits = input_gradient(model, start, labels, loss=loss)
        value = loss(logits, labels)
        step = torch.full((len(clean), 1, 1, 1), 2 * threat.eps, device=clean.device)
        return cls(
            place=torch.arange(len(clean), device=clean.device),
            clean=clean,
            labels=labels,
            current=start,
            previous=start,
            gradient=gradient,
            fooled=~correct(logits, labels),
            loss=value,
            best=start.clone(),
            best_loss=value.clone(),
            best_gradient=gradient.clone(),
            step=step.to(clean.dtype),
            rises=torch.zeros_like(value),
            best_at_checkpoint=value.clone(),
            halved=torch.ones_like(value, dtype=torch.bool),
        )

    def without_fooled(self, found: Tensor) -> _Climb:
        """Write the images that fool the model to ``found``; return the state of the others."""
        if not self.fooled.any():
            return self
        found[self.place[self.fooled]] = self.current[self.fooled]
        keep = ~self.fooled
        return _Climb(**{name: value[keep] for name, value in vars(self).items()})

    def advance(self, model: nn.Module, threat: ThreatModel, loss: Loss) -> None:
        ahead = threat.project(self.current + self.step * threat.ascend(self.gradient), self.clean)
        target = self.current + _MOMENTUM * (ahead - self.current)
        target = threat.project(
            target + (1 - _MOMENTUM) * (self.current - self.previous), self.clean
        )
        self.previous, self.current = self.current, target
        self.gradient, logits = input_gradient(model, target, self.labels, loss=loss)
        value = loss(logits, self.labels)
        self.fooled = ~correct(logits, self.labels)
        self.rises += value > self.loss
        self.loss = value
        better = value > self.best_loss
        self.best_loss = torch.where(better, value, self.best_loss)
        self.best[better] = target[better]
        self.best_gradient[better] = self.gradient[better]

    def adapt(self, period: int) -> None:
        """Halve the step of images that oscillate or stall, and return them to their best point."""
        oscillates = self.rises < _RISING_SHARE * period
        stalls = ~self.halved & (self.best_loss <= self.best_at_checkpoint)
        self.halved = oscillates | stalls
        self.step = torch.where(self.halved.view(-1, 1, 1, 1), self.step / 2, self.step)
        again = self.halved.view(-1, 1, 1, 1)
        self.current = torch.where(again, self.best, self.current)
        self.gradient = torch.where(again, self.best_gradient, self.gradient)
        self.previous = torch.where(again, self.best, self.previous)
        self.loss = torch.where(self.halved, self.best_loss, self.loss)
        self.rises = torch.zeros_like(self.rises)
        self.best_at_checkpoint = self.best_loss.clone()
