"""Score test images, clean, noisy and attacked, obliviously and through each detector.

The arrays have one row per image. ``CONDITION/scores`` (N, G) are the scores of all detectors, NaN
for a detector that was not asked, and ``CONDITION/right`` (N,) is whether the network is right. The
conditions are ``clean``, ``noisy``, each trial's key, and ``TARGET/ATTACK@LEVELS`` for attacks
through a target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medspark.attacks.keyed_random import KeyedRandom
from medspark.attacks.losses import correct
from medspark.attacks.threat import ThreatModel
from medspark.defend.detect.adaptive import Target, adaptive_attacks
from medspark.defend.detect.change_point import second_answer
from medspark.defend.detect.config import AdaptiveSettings
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import Features
from medspark.defend.detect.stored import as_stored, noise_like, within_a_level
from medspark.errors import UsageError
from medspark.evaluate.attacked import Attacker, ImageBatch
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import Batch
from medspark.evaluate.summary import Array, Arrays, Trial

__all__ = ["Examination", "adaptive_key"]


# By how much a feature of the folded network may differ, relative to it and absolutely.
_FOLDED = 1e-3


def adaptive_key(target: str, attack: str, eps: float) -> str:
    """Return the name of the condition of an attack through ``target``."""
    return f"{target}/{Trial(attack, 0, eps).key}"


@dataclass(frozen=True)
class Examination:
    """All that decides the scores of images: network, detectors, targets and attacks."""

    model: nn.Module
    head: str
    detectors: Sequence[Detector]
    targets: Sequence[Target]
    oblivious: AttackSettings
    adaptive: AdaptiveSettings
    bits: int
    surrogates: Sequence[nn.Module] = ()

    def arrays(self, batches: Iterable[Batch]) -> Arrays:
        """Return the arrays of all images. Raises UsageError if there is none."""
        recorder: _Recorder | None = None
        for images, labels, rows in batches:
            if recorder is None:
                attacker = Attacker.on(
                    self.model, images, self.oblivious, surrogates=self.surrogates
                )
                recorder = _Recorder(self, attacker)
            recorder.record(ImageBatch(images, labels, rows))
        if recorder is None:
            raise UsageError("There are no images to examine.")
        return {name: np.concatenate(parts) for name, parts in recorder.found.items()}

    def extractor(self, *detectors: Detector, of: nn.Module | None = None) -> Extractor:
        """Return the extractor of all layers that ``detectors`` look at.

        ``of`` is another form of the network.
        """
        layers = dict.fromkeys(name for each in detectors for name in each.layers)
        return Extractor.on(self.model if of is None else of, tuple(layers), self.head)


@dataclass
class _Recorder:
    of: Examination
    attacker: Attacker
    found: dict[str, list[Array]] = field(default_factory=lambda: defaultdict(list))

    def record(self, batch: ImageBatch) -> None:
        self.found["rows"].append(batch.rows.numpy())
        self.found["labels"].append(batch.labels.cpu().numpy())
        self._score("clean", batch.pixels, batch)
        self._probe(batch)
        first = True
        for attacked in self.attacker.attack(batch, *self.attacker.answer(batch)):
            images = as_stored(
                attacked.images, batch.pixels, threat=attacked.threat, bits=self.of.bits
            )
            if first:
                rng = KeyedRandom(self.of.oblivious.seed, batch.rows)
                noisy = noise_like(images, batch.pixels, rng, bits=self.of.bits)
                self._score("noisy", noisy, batch)
                first = False
            self._score(attacked.trial.key, images, batch, threat=attacked.threat)
        for target in self.of.targets:
            for eps in self.of.oblivious.eps:
                self._attack(target, batch, self.of.oblivious.threat(eps))

    def _attack(self, target: Target, batch: ImageBatch, threat: ThreatModel) -> None:
        extractor = self._attacked_form(target, batch.pixels)
        made = adaptive_attacks(
            target, extractor, batch.pixels, batch.labels, threat=threat, settings=self.of.adaptive
        )
        for name, images in made:
            images = as_stored(images, batch.pixels, threat=threat, bits=self.of.bits)
            key = adaptive_key(target.key, name, threat.eps)
            self._score(key, images, batch, threat=threat, aimed_at=target)

    @torch.no_grad()
    def _attacked_form(self, target: Target, images: Tensor) -> Extractor:
        """Return the features of the target's layers by the attacker's copy of the network.

        Its batch norms are folded, which is faster. Where a layer of the copy has other values
        (a convolution whose batch norm is folded into it), the network itself is attacked.
        """
        own, folded = (
            self.of.extractor(target.detector, of=model)
            for model in (self.of.model, self.attacker.model)
        )
        few = images[:2]
        pairs = zip(
            own.without_components()(few).layers.values(),
            folded.without_components()(few).layers.values(),
            strict=True,
        )
        same = all(torch.allclose(a, b, rtol=_FOLDED, atol=_FOLDED) for a, b in pairs)
        return folded if same else own

    @torch.no_grad()
    def _score(
        self,
        condition: str,
        images: Tensor,
        batch: ImageBatch,
        *,
        threat: ThreatModel | None = None,
        aimed_at: Target | None = None,
    ) -> None:
        """Record the scores of ``images``, and whether the network is right.

        (k, p) takes many passes, so it is left out for images that aim at another detector.
        """
        extractor = self.of.extractor(*self.of.detectors)
        if aimed_at is not None and not aimed_at.has_components:
            extractor = extractor.without_components()
        features, points = extractor.with_points(images)
        self._add(f"{condition}/scores", scores_of(self.of.detectors, features))
        self._add(f"{condition}/right", correct(features.logits, batch.labels))
        for name, point in points.items():
            self._add(f"{condition}/{name}/answer", point.answer)
        if points:
            self._add(f"{condition}/second", second_answer(features.logits))
        if threat is not None:
            self._add(f"{condition}/outside", ~threat.holds(images, batch.pixels))
        self._soft(condition, images, [aimed_at] if aimed_at else self.of.targets)

    def _soft(self, condition: str, images: Tensor, targets: Iterable[Target]) -> None:
        """Record the scores of surrogates that differ from their detectors."""
        for target in targets:
            if not target.detector.has_gradient:
                features = self.of.extractor(target.detector).soft(images, 0)
                soft = target.detector.surrogate(features).double()
                self._add(f"{condition}/soft/{target.key}", soft)

    @torch.no_grad()
    def _probe(self, batch: ImageBatch) -> None:
        """Record scores again in two halves, and of the same images as files."""
        rng = KeyedRandom(self.of.oblivious.seed, batch.rows)
        extractor = self.of.extractor(*self.of.detectors).without_components()

        def scores(images: Tensor) -> Tensor:
            return scores_of(self.of.detectors, extractor(images))

        halves = [scores(half) for half in batch.pixels.chunk(2)]
        self._add("again/scores", torch.cat(halves))
        same_file = within_a_level(batch.pixels, rng, bits=self.of.bits)
        self._add("same_file/scores", scores(same_file))

    def _add(self, name: str, values: Tensor) -> None:
        self.found[name].append(values.detach().cpu().numpy())


def scores_of(detectors: Sequence[Detector], features: Features) -> Tensor:
    """Return the scores (B, G); NaN for a detector whose layers are not among the features."""
    never = torch.full((len(features.logits),), torch.nan, dtype=torch.float64)
    known = features.layers.keys()
    scores = [
        each.score(features).double() if known >= set(each.layers) else never for each in detectors
    ]
    return torch.stack(scores, dim=1)
