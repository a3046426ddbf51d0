"""Every attack by name, with one signature, and ensembles of attacks.

An attack takes (model, images, labels, threat model, rng) and returns images inside the threat
model. Minimum-distance attacks (FAB, DeepFool, Carlini-Wagner) have no budget. Their images are
projected into the threat model, and still fool the model if they were near enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from medspark.attacks.apgd import apgd
from medspark.attacks.bpda import bpda_pgd, unguarded_pgd
from medspark.attacks.carlini_wagner import carlini_wagner
from medspark.attacks.config import Effort
from medspark.attacks.deepfool import deepfool
from medspark.attacks.fab import fab
from medspark.attacks.fgsm import fgsm
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import Loss, correct, cross_entropy, dlr, margin, rescaled
from medspark.attacks.pgd import pgd
from medspark.attacks.square import square
from medspark.attacks.threat import ThreatModel
from medspark.attacks.transfer import transfer

Attack = Callable[[nn.Module, Tensor, Tensor, ThreatModel, KeyedRandom], Tensor]


def attacks_by_name(
    names: Sequence[str], effort: Effort, *, surrogates: Sequence[nn.Module] = ()
) -> dict[str, Attack]:
    """Return the attacks called ``names``. Raises KeyError for an unknown name."""
    known: Mapping[str, Attack] = {
        "fgsm": _fgsm,
        "pgd": _pgd(cross_entropy, effort),
        "pgd_margin": _pgd(margin, effort),
        "pgd_rescaled": _pgd(rescaled(cross_entropy), effort),
        "apgd_ce": _apgd(cross_entropy, effort),
        "apgd_dlr": _apgd(dlr, effort),
        "fab": partial(_fab, steps=effort.steps_of("fab")),
        "deepfool": _deepfool,
        "cw": _carlini_wagner,
        "square": partial(_square, queries=effort.queries),
        "transfer": partial(_transfer, surrogates=surrogates, steps=effort.steps),
        "bpda_pgd": partial(_of_denoised, how=bpda_pgd, steps=effort.steps),
        "unguarded_pgd": partial(_of_denoised, how=unguarded_pgd, steps=effort.steps),
    }
    ensembles: Mapping[str, Attack] = {
        "apgd": one_after_another([known["apgd_ce"], known["apgd_dlr"]]),
        # The attacks of AutoAttack, in its order (Croce and Hein 2020). With two classes, DLR is
        # the margin: the ratio needs a third logit.
        "autoattack": one_after_another(
            [known[name] for name in ("apgd_ce", "apgd_dlr", "fab", "square")]
        ),
    }
    return {name: (known | ensembles)[name] for name in names}  # type: ignore[operator]


def one_after_another(attacks: Sequence[Attack]) -> Attack:
    """Return the attack that runs each of ``attacks`` on the images not yet fooled."""

    def ensemble(
        model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: KeyedRandom
    ) -> Tensor:
        found, held = images.clone(), torch.arange(len(images), device=images.device)
        for attack in attacks:
            if len(held) == 0:
                break
            found[held] = attack(model, images[held], labels[held], threat, rng.of(held))
            with torch.no_grad():
                held = held[correct(model(found[held]), labels[held])]
        return found

    return ensemble


def _fgsm(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, _rng: KeyedRandom
) -> Tensor:
    return fgsm(model, images, labels, threat=threat)


def _pgd(loss: Loss, effort: Effort) -> Attack:
    def attack(
        model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: KeyedRandom
    ) -> Tensor:
        start = threat.random_start(images, rng.noise(images, "pgd/0"))
        climb = partial(pgd, model, threat=threat, steps=effort.steps, loss=loss)
        found = climb(images, labels, start=start)
        for restart in range(1, effort.restarts):
            with torch.no_grad():
                held = correct(model(found), labels).nonzero().flatten()
            if len(held) == 0:
                break
            noise = rng.of(held).noise(images[held], f"pgd/{restart}")
            start = threat.random_start(images[held], noise)
            found[held] = climb(images[held], labels[held], start=start, stop_when_fooled=True)
        return found

    return attack


def _apgd(loss: Loss, effort: Effort) -> Attack:
    def attack(
        model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: KeyedRandom
    ) -> Tensor:
        steps = effort.steps_of("apgd")
        return apgd(model, images, labels, threat=threat, loss=loss, rng=rng, steps=steps)

    return attack


def _fab(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: KeyedRandom,
    *,
    steps: int,
) -> Tensor:
    found = fab(model, images, labels, norm=threat.norm, rng=rng, steps=steps)
    return threat.project(found, images)


def _deepfool(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, _rng: KeyedRandom
) -> Tensor:
    return threat.project(deepfool(model, images, labels, norm=threat.norm), images)


def _carlini_wagner(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, _rng: KeyedRandom
) -> Tensor:
    return threat.project(carlini_wagner(model, images, labels), images)


def _square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: KeyedRandom,
    *,
    queries: int,
) -> Tensor:
    return square(model, images, labels, eps=threat.eps, rng=rng, queries=queries)


def _transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    _rng: KeyedRandom,
    *,
    surrogates: Sequence[nn.Module],
    steps: int,
) -> Tensor:
    return transfer(model, images, labels, threat=threat, surrogates=surrogates, steps=steps)


def _of_denoised(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: KeyedRandom,
    *,
    how: Callable[..., Tensor],
    steps: int,
) -> Tensor:
    start = threat.random_start(images, rng.noise(images, "pgd/0"))
    return how(model, images, labels, threat=threat, steps=steps, start=start)
