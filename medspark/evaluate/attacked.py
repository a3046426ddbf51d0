"""Run every attack at every budget, batch by batch, for reports and detectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medspark.attacks.bpda import is_denoised
from medspark.attacks.fgsm import one_step
from medspark.attacks.gradient import input_gradient
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct, cross_entropy
from medspark.attacks.suite import Attack, attacks_by_name
from medspark.attacks.threat import ThreatModel
from medspark.evaluate.budgets import ENSEMBLES, NEAREST, Found, downwards, once
from medspark.evaluate.config import AttackSettings, check_attacks
from medspark.evaluate.deploy import evaluation_copy
from medspark.evaluate.sanity import CONTROL_EVERY
from medspark.evaluate.summary import Trial

__all__ = ["AttackedBatch", "Attacker", "ImageBatch", "attacked_batches", "has_gradients"]

# These attacks run on every image. The others run only on images that the network gets right, so
# AUROC under them is higher than if the attacker also harmed the wrong ones.
_ATTACK_EVERY_IMAGE = frozenset(
    {"fgsm", "pgd", "pgd_margin", "pgd_rescaled", "bpda_pgd", "unguarded_pgd"}
)


@dataclass(frozen=True)
class ImageBatch:
    """Images (B, C, H, W) in [0, 1], labels (B,) or (B, K), and row numbers in the dataset (B,)."""

    pixels: Tensor
    labels: Tensor
    rows: Tensor

    def of(self, chosen: Tensor) -> ImageBatch:
        """Return a part of the batch; ``chosen`` holds positions in the batch, or is a mask."""
        return ImageBatch(self.pixels[chosen], self.labels[chosen], self.rows[chosen.cpu()])


@dataclass(frozen=True)
class AttackedBatch:
    """A batch under one attack at one budget: attacked images (B, C, H, W), their logits (B, K).

    ``carried`` (B,) marks images that were not attacked at this budget, because they held at a
    larger one.
    """

    trial: Trial
    threat: ThreatModel
    clean: ImageBatch
    images: Tensor
    logits: Tensor
    carried: Tensor


@dataclass(frozen=True)
class Attacker:
    """A model prepared for evaluation, and the attacks on it."""

    model: nn.Module
    attacks: Mapping[str, Attack]
    config: AttackSettings

    @classmethod
    def on(
        cls,
        model: nn.Module,
        images: Tensor,
        config: AttackSettings,
        *,
        surrogates: Sequence[nn.Module] = (),
        own_attacks: Mapping[str, Attack] | None = None,
    ) -> Attacker:
        """Return the attacks of ``config``, and ``own_attacks``, on a copy of ``model``.

        The copy is in eval mode and float32, and is checked with ``images`` (B, C, H, W).
        Raises UsageError for an attack that needs gradients, surrogates or a denoiser that are
        missing.
        """
        check_attacks(
            config.attacks,
            gradients=has_gradients(model),
            surrogates=len(surrogates),
            denoised=is_denoised(model),
        )
        victims = [evaluation_copy(network, images[:2]) for network in (model, *surrogates)]
        named = attacks_by_name(config.attacks, config.effort, surrogates=victims[1:])
        return cls(victims[0], named | dict(own_attacks or {}), config)

    def answer(self, batch: ImageBatch) -> tuple[Tensor, Tensor | None]:
        """Return the clean logits (B, K), and the gradient of the loss, None without gradients."""
        if not has_gradients(self.model):
            return self.logits(batch.pixels), None
        gradient, logits = input_gradient(
            self.model, batch.pixels, batch.labels, loss=cross_entropy
        )
        return logits, gradient

    def attack(
        self, batch: ImageBatch, logits: Tensor, gradient: Tensor | None
    ) -> Iterator[AttackedBatch]:
        """Yield ``batch`` under every attack at every budget.

        ``logits`` and ``gradient`` are the results of ``answer``. FGSM at every eps uses the same
        ``gradient``.
        """
        right = correct(logits, batch.labels).nonzero().flatten()
        together = self._at_all_budgets(batch.of(right))
        for eps in self.config.eps:
            threat = self.config.threat(eps)
            for name, attack in self.attacks.items():
                carried = torch.zeros_like(batch.rows, dtype=torch.bool)
                if name == "fgsm" and gradient is not None:
                    attacked = one_step(batch.pixels, gradient, threat=threat)
                elif name in _ATTACK_EVERY_IMAGE:
                    attacked = self._run(attack, batch, threat)
                elif (name, eps) in together:
                    found = together[name, eps]
                    attacked = _placed(found.images, right, batch.pixels)
                    carried = _placed(found.carried.cpu(), right.cpu(), carried)
                else:
                    few = self._run(attack, batch.of(right), threat)
                    attacked = _placed(few, right, batch.pixels)
                trial = Trial(name, self.config.effort.steps_of(name), eps)
                answers = logits if eps == 0 else self.logits(attacked)
                yield AttackedBatch(trial, threat, batch, attacked, answers, carried)

    def _at_all_budgets(self, batch: ImageBatch) -> dict[tuple[str, float], Found]:
        """Return what attacks find that do not attack each budget alone, by name and budget."""
        threats = {eps: self.config.threat(eps) for eps in self.config.eps if eps > 0}
        if len(batch.rows) == 0 or not threats:
            return {}
        control = (batch.rows % CONTROL_EVERY == 0).to(batch.pixels.device)

        def fools(images: Tensor) -> Tensor:
            return ~correct(self.logits(images), batch.labels)

        together: dict[tuple[str, float], Found] = {}
        for name, attack in self.attacks.items():

            def run(threat: ThreatModel, chosen: Tensor, attack: Attack = attack) -> Tensor:
                return self._run(attack, batch.of(chosen), threat)

            if name in NEAREST:
                found = once(run, batch.pixels, threats)
            elif name in ENSEMBLES:
                found = downwards(run, batch.pixels, threats, fools=fools, control=control)
            else:
                continue
            together |= {(name, eps): each for eps, each in found.items()}
        return together

    def _run(self, attack: Attack, batch: ImageBatch, threat: ThreatModel) -> Tensor:
        if len(batch.rows) == 0 or threat.eps == 0:
            return batch.pixels
        rng = KeyedRandom(self.config.seed, batch.rows)
        return attack(self.model, batch.pixels, batch.labels, threat, rng)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Return the model's logits (B, K)."""
        logits: Tensor = self.model(pixels)
        return logits


def attacked_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    config: AttackSettings,
    *,
    surrogates: Sequence[nn.Module] = (),
    own_attacks: Mapping[str, Attack] | None = None,
) -> Iterator[AttackedBatch]:
    """Yield every batch (images, labels, rows) under every attack at every budget.

    Only one batch is in memory. Raises UsageError for an attack that needs gradients or surrogates
    that are missing.
    """
    attacker: Attacker | None = None
    for images, labels, rows in batches:
        attacker = attacker or Attacker.on(
            model, images, config, surrogates=surrogates, own_attacks=own_attacks
        )
        batch = ImageBatch(images, labels, rows)
        yield from attacker.attack(batch, *attacker.answer(batch))


def _placed(few: Tensor, places: Tensor, images: Tensor) -> Tensor:
    """Return a copy of ``images`` with ``few`` at ``places``."""
    whole = images.clone()
    whole[places] = few
    return whole


def has_gradients(model: nn.Module) -> bool:
    """Return whether attacks may use the model's gradient; ``gradients = False`` disables it."""
    return bool(getattr(model, "gradients", True))
