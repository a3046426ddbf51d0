"""PGD-20 against foolbox's and ART's, on the same network, batch, steps and step size.

Ours includes what it takes to be fast: making the copy with folded batch norm and checking it.
Before the clock starts both sides are held to the same accuracy under attack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import Result, by_turns
from torch import Tensor, nn

from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.deploy import evaluation_copy
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

_STEPS, _BATCH, _SIDE = 20, 32, 64
_CPU = torch.device("cpu")
_THREAT = ThreatModel(eps=2 / 255)
_STEP = 2.5 * _THREAT.eps / _STEPS

_LOGGER = logging.getLogger(__name__)


def _network(
    name: str, side: int, *, device: torch.device, batch: int
) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = build(ModelConfig(name=name), num_classes=2, channels=1).eval().to(device)
    images = torch.rand(batch, 1, side, side).to(device)
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, images, labels


def _ours(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    copied = evaluation_copy(model, images[:2])
    return pgd(copied, images, labels, threat=_THREAT, steps=_STEPS, step=_STEP)


def _compare(
    theirs: Callable[[nn.Module, Tensor, Tensor], Tensor],
    name: str = "mobilenetv2_100",
    side: int = _SIDE,
    *,
    device: torch.device = _CPU,
    batch: int = _BATCH,
) -> Result:
    model, images, labels = _network(name, side, device=device, batch=batch)
    for attack in (_ours, theirs):
        attacked = attack(model, images, labels)
        with torch.no_grad():
            held = (model(attacked).argmax(1) == labels).float().mean()
        _LOGGER.info("%s leaves %.3f", attack.__name__, float(held))

    def work(attack: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        attack(model, images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    ratios = by_turns(partial(work, _ours), partial(work, theirs))
    return Result(tuple(1 / ratio for ratio in ratios), goal=1.5, higher_is_better=True)


def against_foolbox(**chosen: Any) -> Result:
    """Return how many times as long foolbox takes; ``chosen`` are arguments of ``_compare``."""
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=_STEP, steps=_STEPS, random_start=False)

    def theirs(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        return attack(wrapped, images, labels, epsilons=_THREAT.eps)[1]

    return _compare(theirs, **chosen)


def against_art() -> Result:
    """Return how many times as long the Adversarial Robustness Toolbox takes."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def theirs(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 2, clip_values=(0, 1)
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier, eps=_THREAT.eps, eps_step=_STEP, max_iter=_STEPS, batch_size=_BATCH,
            verbose=False,
        )  # fmt: skip
        return torch.from_numpy(attack.generate(images.numpy(), np.asarray(labels)))

    return _compare(theirs)


BENCHMARKS = {"pgd_vs_foolbox": against_foolbox, "pgd_vs_art": against_art}
