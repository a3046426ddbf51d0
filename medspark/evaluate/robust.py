"""Evaluate a classifier clean and under attack.

Every rank may hold a slice of the images. The arrays of all ranks are gathered, and every rank
returns the result on all images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.bpda import is_denoised
from medspark.attacks.gradient import zero_gradient
from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct, margin, probabilities, rescaled
from medspark.attacks.pgd import pgd
from medspark.attacks.suite import Attack
from medspark.attacks.threat import ThreatModel, norms
from medspark.errors import UsageError
from medspark.evaluate.attacked import AttackedBatch, Attacker, ImageBatch, has_gradients
from medspark.evaluate.budgets import ENSEMBLES
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.quality import psnr, ssim
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.sanity import PROBE_STEPS
from medspark.evaluate.summary import (
    Array,
    Arrays,
    Detail,
    each_once,
    summarise,
)

__all__ = [
    "Array", "Batch", "Gather", "attack_all", "evaluate",
]  # fmt: skip

# Images (B, C, H, W) in [0, 1], labels ((B,), or (B, K) for findings), and the images' row numbers
# in the dataset (B,).
Batch = tuple[Tensor, Tensor, Tensor]
Gather = Callable[[Array], Array]


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
) -> RobustnessResult:
    """Return the result of ``model`` on ``batches``, clean and under every attack.

    ``gather`` concatenates an array of all ranks along its first axis. Every rank must hold at
    least one image; repeated images count once. ``model`` is not changed: the attacks run on a copy
    in eval mode and float32. ``positive`` is the class of sensitivity, by default the last one.
    ``own_attacks`` run in addition to those of ``config``. The sanity probes take the rows below
    ``probed_below``, by default ``config.sanity_images``.
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
    """Attack every image and return the arrays that ``medspark.evaluate.summary`` describes.

    Raises UsageError if there is no image, or if an attack needs gradients or surrogates that are
    missing.
    """
    found = _ArraysByName()
    recorder: _Recorder | None = None
    for images, labels, rows in batches:
        if recorder is None:
            attacker = Attacker.on(
                model, images, config, surrogates=surrogates, own_attacks=own_attacks
            )
            probed = config.sanity_images if probed_below is None else probed_below
            recorder = _Recorder(attacker, config, found, probed)
        recorder.record(ImageBatch(images, labels, rows))
    if recorder is None:
        raise UsageError("There are no images to evaluate.")
    return found.arrays()


class _ArraysByName:
    """Arrays by name, one row per image, collected batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._parts[name].append(values.detach().cpu().numpy())

    def arrays(self) -> Arrays:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


@dataclass(frozen=True)
class _Recorder:
    """Attacks the batches of one model and records the results per image."""

    attacker: Attacker
    config: AttackSettings
    found: _ArraysByName
    probed_below: int  # the sanity probes take the rows below this one

    def record(self, batch: ImageBatch) -> None:
        clean, gradient = self.attacker.answer(batch)
        self.found.add("rows", batch.rows)
        self.found.add("labels", batch.labels)
        if gradient is not None:
            self.found.add("zero_gradient", zero_gradient(gradient))
        self.found.add("clean", probabilities(clean, batch.labels))
        self._compare("clean", batch.pixels, batch.pixels)
        for attacked in self.attacker.attack(batch, clean, gradient):
            self._record(attacked)
        if self.config.sanity_images > 0 and max(self.config.eps, default=0.0) > 0:
            self._probe(batch, clean)

    def _record(self, attacked: AttackedBatch) -> None:
        key, clean = attacked.trial.key, attacked.clean
        change = attacked.images - clean.pixels
        self.found.add(key, probabilities(attacked.logits, clean.labels))
        self.found.add(f"{key}/linf_255", 255 * change.abs().flatten(1).amax(1))
        self.found.add(f"{key}/rms_255", 255 * norms(change).flatten() / change[0].numel() ** 0.5)
        outside = ~attacked.threat.holds(attacked.images, clean.pixels)
        self.found.add(f"{key}/outside", outside)
        if attacked.trial.name in ENSEMBLES:
            self.found.add(f"{key}/carried", attacked.carried)
        self._compare(key, attacked.images, clean.pixels)

    @torch.no_grad()
    def _compare(self, key: str, seen: Tensor, clean: Tensor) -> None:
        """Record how near the denoised images are to the clean ones, if there is a denoiser."""
        if is_denoised(self.attacker.model):
            denoised = self.attacker.model.denoiser(seen)
            self.found.add(f"{key}/psnr", psnr(denoised, clean))
            self.found.add(f"{key}/ssim", ssim(denoised, clean))

    def _probe(self, batch: ImageBatch, clean: Tensor) -> None:
        """Run the sanity probes (margin PGD, noise, re-batching) at the largest eps."""
        # NaN marks images that the probes do not take.
        margin_held = torch.full((len(batch.rows),), torch.nan)
        unsteady = margin_held.clone()
        noisy = torch.full_like(probabilities(clean, batch.labels), torch.nan)
        chosen = (batch.rows < self.probed_below).nonzero().flatten()
        if len(chosen) > 0:
            few, threat = batch.of(chosen), self.config.threat(max(self.config.eps))
            if has_gradients(self.attacker.model):
                margin_held[chosen] = self._held_under_margin(few, threat)
            noise = KeyedRandom(self.config.seed, few.rows).noise(few.pixels, "noise")
            step = threat.eps * (2 * noise - 1).sign()
            pixels = threat.project(few.pixels + step, few.pixels)
            noisy[chosen] = probabilities(self.attacker.logits(pixels), few.labels)
            unsteady[chosen] = self._unsteadiness(few)
        self.found.add("margin_held", margin_held)
        self.found.add("noise", noisy)
        self.found.add("unsteady", unsteady)

    def _held_under_margin(self, batch: ImageBatch, threat: ThreatModel) -> Tensor:
        attacked = pgd(
            self.attacker.model,
            batch.pixels,
            batch.labels,
            threat=threat,
            steps=PROBE_STEPS,
            loss=rescaled(margin),
            stop_when_fooled=True,
        )
        return self._right(attacked, batch)

    def _right(self, pixels: Tensor, batch: ImageBatch) -> Tensor:
        return correct(self.attacker.logits(pixels), batch.labels).float().cpu()

    def _unsteadiness(self, batch: ImageBatch) -> Tensor:
        """Return how much each image's probabilities change when the batch is split in two."""
        whole = self.attacker.logits(batch.pixels)
        halves = torch.cat([self.attacker.logits(half) for half in batch.pixels.chunk(2)])
        change = probabilities(whole, batch.labels) - probabilities(halves, batch.labels)
        return change.abs().amax(1).float().cpu()
