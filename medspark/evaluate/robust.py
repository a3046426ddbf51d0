"""Accuracy under attack: what is left of a classifier when somebody means to fool it.

Every rank may hold a slice of the images: what it finds about its own is gathered, and every
rank ends up with the report on all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.chance import Chance
from medspark.attacks.fgsm import one_step
from medspark.attacks.gradient import input_gradient, zero_gradient
from medspark.attacks.losses import correct, cross_entropy, margin, probabilities, rescaled
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import Attack, attacks_by_name
from medspark.attacks.threat import ThreatModel, norms
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, check_attacks
from medspark.evaluate.deploy import evaluation_copy
from medspark.evaluate.sanity import PROBE_STEPS
from medspark.evaluate.summary import (
    Array,
    Arrays,
    Detail,
    RobustReport,
    Trial,
    each_once,
    summarise,
)

__all__ = [
    "Array", "Batch", "Gather", "RobustReport", "attack_all", "evaluate",
]  # fmt: skip

# Images (B, C, H, W) in [0, 1], labels, (B,) or for findings (B, K), and the images' numbers in
# the data set (B,).
Batch = tuple[Tensor, Tensor, Tensor]
Gather = Callable[[Array], Array]

# Attacks whose attacked images also say how sure the network is of them, so that AUROC under
# attack is that of an attacker who harms every image, not only those that are right.
_ATTACK_EVERY_IMAGE = frozenset({"fgsm", "pgd", "pgd_margin", "pgd_rescaled"})


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: AttackSettings,
    *,
    gather: Gather | None = None,
    positive: int | None = None,
    surrogates: Sequence[nn.Module] = (),
    own_attacks: Mapping[str, Attack] | None = None,
    probed_below: int | None = None,
    detail: Detail | None = None,
) -> RobustReport:
    """Return how good ``model`` is on ``batches``, clean and under every attack.

    ``gather`` joins the same array of all ranks along its first axis; a rank holds at least
    one image, and may repeat one. ``model`` is not changed: a copy in eval mode and float32 is
    attacked. ``positive`` is the class that sensitivity is about, the last by default.
    ``own_attacks`` are tried beside those that ``config`` names. The sanity probes take
    the rows below ``probed_below``, by default the first ``config.sanity_images``.
    """
    arrays = attack_all(
        model,
        batches,
        config,
        surrogates=surrogates,
        own_attacks=own_attacks,
        probed_below=probed_below,
    )
    if gather is not None:
        arrays = {name: gather(values) for name, values in arrays.items()}
    return summarise(
        each_once(arrays),
        config.trials(own_attacks or ()),
        limits=config.sanity,
        positive=positive,
        detail=detail,
    )


def attack_all(
    model: nn.Module,
    batches: Iterable[Batch],
    config: AttackSettings,
    *,
    surrogates: Sequence[nn.Module] = (),
    own_attacks: Mapping[str, Attack] | None = None,
    probed_below: int | None = None,
) -> Arrays:
    """Return what every attack does to every image, as ``medspark.evaluate.summary`` reads it.

    Raises UsageError for an attack that needs what ``model`` has not, and if there is no image.
    """
    check_attacks(config.attacks, gradients=_has_gradients(model), surrogates=len(surrogates))
    found = _Findings()
    attacker: _Attacker | None = None
    for images, labels, rows in batches:
        if attacker is None:
            victims = [evaluation_copy(network, images[:2]) for network in (model, *surrogates)]
            named = attacks_by_name(config.attacks, config.effort, surrogates=victims[1:])
            named |= dict(own_attacks or {})
            probed = config.sanity_images if probed_below is None else probed_below
            attacker = _Attacker(victims[0], named, config, found, probed)
        attacker.attack(_Images(images, labels, rows))
    if attacker is None:
        raise UsageError("There are no images to evaluate.")
    return found.arrays()


@dataclass(frozen=True)
class _Images:
    pixels: Tensor
    labels: Tensor
    rows: Tensor

    def of(self, chosen: Tensor) -> _Images:
        return _Images(self.pixels[chosen], self.labels[chosen], self.rows[chosen.cpu()])


class _Findings:
    """Arrays by name, one row per image, collected batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._parts[name].append(values.detach().cpu().numpy())

    def arrays(self) -> Arrays:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


@dataclass(frozen=True)
class _Attacker:
    """Attacks batch after batch of one model, and writes down what it finds."""

    model: nn.Module
    attacks: Mapping[str, Attack]
    config: AttackSettings
    found: _Findings
    probed_below: int  # the sanity probes take the rows below

    def attack(self, batch: _Images) -> None:
        clean, gradient = self._look(batch)
        right = correct(clean, batch.labels).nonzero().flatten()
        for eps in self.config.eps:
            threat = self.config.threat(eps)
            for name, attack in self.attacks.items():
                if name == "fgsm":
                    attacked = one_step(batch.pixels, gradient, threat=threat)
                elif name in _ATTACK_EVERY_IMAGE:
                    attacked = self._run(attack, batch, threat)
                else:
                    attacked = batch.pixels.clone()
                    attacked[right] = self._run(attack, batch.of(right), threat)
                logits = clean if eps == 0 else self._logits(attacked)
                self._record(Trial(name, 0, eps).key, batch, attacked, threat, logits)
        if self.config.sanity_images > 0 and max(self.config.eps, default=0.0) > 0:
            self._probe(batch, clean)

    def _look(self, batch: _Images) -> tuple[Tensor, Tensor]:
        """Return the clean logits and the gradient, which serves FGSM at every eps."""
        self.found.add("rows", batch.rows)
        self.found.add("labels", batch.labels)
        gradient = torch.zeros_like(batch.pixels)
        if _has_gradients(self.model):
            loss = cross_entropy
            gradient, clean = input_gradient(self.model, batch.pixels, batch.labels, loss=loss)
            self.found.add("zero_gradient", zero_gradient(gradient))
        else:
            clean = self._logits(batch.pixels)
        self.found.add("clean", probabilities(clean, batch.labels))
        return clean, gradient

    def _run(self, attack: Attack, batch: _Images, threat: ThreatModel) -> Tensor:
        if len(batch.rows) == 0 or threat.eps == 0:
            return batch.pixels
        chance = Chance(self.config.seed, batch.rows)
        return attack(self.model, batch.pixels, batch.labels, threat, chance)

    def _record(
        self, key: str, batch: _Images, attacked: Tensor, threat: ThreatModel, logits: Tensor
    ) -> None:
        change = attacked - batch.pixels
        self.found.add(key, probabilities(logits, batch.labels))
        self.found.add(f"{key}/linf_255", 255 * change.abs().flatten(1).amax(1))
        self.found.add(f"{key}/rms_255", 255 * norms(change).flatten() / change[0].numel() ** 0.5)
        self.found.add(f"{key}/outside", ~threat.holds(attacked, batch.pixels))

    def _probe(self, batch: _Images, clean: Tensor) -> None:
        """Run the sanity probes (margin PGD, noise, re-batching) at the largest eps."""
        # Not-a-number marks the images that are left out.
        margin_held = torch.full((len(batch.rows),), torch.nan)
        unsteady = margin_held.clone()
        noisy = torch.full_like(probabilities(clean, batch.labels), torch.nan)
        chosen = (batch.rows < self.probed_below).nonzero().flatten()
        if len(chosen) > 0:
            few, threat = batch.of(chosen), self.config.threat(max(self.config.eps))
            if _has_gradients(self.model):
                margin_held[chosen] = self._held_under_margin(few, threat)
            noise = Chance(self.config.seed, few.rows).noise(few.pixels, "noise")
            step = threat.eps * (2 * noise - 1).sign()
            pixels = threat.project(few.pixels + step, few.pixels)
            noisy[chosen] = probabilities(self._logits(pixels), few.labels)
            unsteady[chosen] = self._unsteadiness(few)
        self.found.add("margin_held", margin_held)
        self.found.add("noise", noisy)
        self.found.add("unsteady", unsteady)

    def _held_under_margin(self, batch: _Images, threat: ThreatModel) -> Tensor:
        attacked = pgd(
            self.model,
            batch.pixels,
            batch.labels,
            threat=threat,
            steps=PROBE_STEPS,
            loss=rescaled(margin),
            stop_when_fooled=True,
        )
        return self._right(attacked, batch)

    def _right(self, pixels: Tensor, batch: _Images) -> Tensor:
        return correct(self._logits(pixels), batch.labels).float().cpu()

    def _unsteadiness(self, batch: _Images) -> Tensor:
        """Return how far each image's probabilities move when it comes in other company."""
        together = self._logits(batch.pixels)
        halves = torch.cat([self._logits(half) for half in batch.pixels.chunk(2)])
        apart = probabilities(together, batch.labels) - probabilities(halves, batch.labels)
        return apart.abs().amax(1).float().cpu()

    @torch.no_grad()
    def _logits(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixels)
        return logits


def _has_gradients(model: nn.Module) -> bool:
    """Return whether attacks may follow the gradient; a model says no by ``gradients = False``."""
    return bool(getattr(model, "gradients", True))
