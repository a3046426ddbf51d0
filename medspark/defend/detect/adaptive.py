"""Attack a network through a detector, by every attack that is made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from medspark.attacks.evasion import Watch
from medspark.attacks.leading_pgd import leading_pgd
from medspark.attacks.orthogonal_pgd import orthogonal_pgd
from medspark.attacks.threat import ThreatModel
from medspark.attacks.weighted_pgd import weighted_pgd
from medspark.defend.detect.config import AdaptiveName, AdaptiveSettings
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.registry import COMPONENT_LAYERS

__all__ = ["Target", "adaptive_attacks"]


@dataclass(frozen=True)
class Target:
    """A detector to attack, and the mean and deviation of its scores of clean images.

    With standardised scores, the weights of a search mean the same for every detector.
    """

    detector: Detector
    mean: float
    deviation: float

    @property
    def key(self) -> str:
        """The name of the target among the names of arrays and in reports."""
        return key_of(self.detector)

    @property
    def has_components(self) -> bool:
        """Whether the detector looks at the principal components of images."""
        return any(name in COMPONENT_LAYERS for name in self.detector.layers)

    def watch(self, extractor: Extractor) -> Watch:
        """Return the logits and the standardised suspicion that an attacker differentiates."""

        def look(images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
            # The guard's own draw is 0, which the attacker does not know.
            features = extractor.soft(images, draw + 1)
            suspicion = self.detector.surrogate(features)
            return features.logits, (suspicion - self.mean) / self.deviation

        return look


def key_of(detector: Detector) -> str:
    """Return the name of a detector on its layer: kde:penultimate."""
    return f"{detector.name}:{detector.layer}"


def adaptive_attacks(
    target: Target,
    extractor: Extractor,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    settings: AdaptiveSettings,
) -> Iterator[tuple[AdaptiveName, Tensor]]:
    """Yield each attack's name and its images inside ``threat``.

    ``extractor`` reads the target's layers. All images are attacked: one that is wrong when clean
    may still be caught.
    """
    known: Mapping[AdaptiveName, Callable[..., Tensor]] = {
        "project_classifier": partial(orthogonal_pgd, variant="project_classifier"),
        "project_detector": partial(orthogonal_pgd, variant="project_detector"),
        "selective": partial(orthogonal_pgd, variant="selective"),
        "weighted": partial(weighted_pgd, searches=settings.searches),
        "leading": leading_pgd,
    }
    watch = target.watch(extractor)
    for name in settings.attacks:
        if name != "leading" or target.has_components:
            attack = known[name]
            yield name, attack(watch, images, labels, threat=threat, steps=settings.steps)
