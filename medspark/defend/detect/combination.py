"""The logistic combination of several detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medspark.defend.detect.detector import ALL_LAYERS, Detector, Training
from medspark.defend.detect.features import Features
from medspark.defend.detect.logistic import Logistic

__all__ = ["Combination", "combine"]


@dataclass(frozen=True)
class Combination(Detector):
    """Logistic regression on the scores of ``detectors``."""

    name = "combination"
    learns_from_attacks = True

    detectors: tuple[Detector, ...]
    regression: Logistic

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that any of the detectors looks at."""
        return tuple(dict.fromkeys(name for each in self.detectors for name in each.layers))

    @property
    def has_gradient(self) -> bool:
        """Whether the score of every part has a gradient."""
        return all(each.has_gradient for each in self.detectors)

    def score(self, features: Features) -> Tensor:
        """Return the log-odds (B,) of being attacked."""
        scores = [each.score(features) for each in self.detectors]
        return self.regression(torch.stack(scores, dim=1))

    def surrogate(self, features: Features) -> Tensor:
        """Return the log-odds (B,), from the surrogates of the detectors."""
        scores = [each.surrogate(features) for each in self.detectors]
        return self.regression(torch.stack(scores, dim=1))


def combine(detectors: Sequence[Detector], training: Training) -> Combination:
    """Return the combination that separates attacked from clean and noisy training images."""
    parts = [training.clean, training.noisy, *training.attacked]
    scores = [torch.stack([each.score(part) for each in detectors], dim=1) for part in parts]
    honest = len(scores[0]) + len(scores[1])
    values = torch.cat(scores)
    regression = Logistic.fit(values, torch.arange(len(values)) >= honest)
    return Combination(ALL_LAYERS, tuple(detectors), regression)
