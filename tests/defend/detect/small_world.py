"""A small network, detectors on it, and an examination of digits: for the tests of guards."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from medspark.defend.detect.adaptive import Target
from medspark.defend.detect.choose import Choice, choose, fit_all, training_of
from medspark.defend.detect.config import AdaptiveSettings
from medspark.defend.detect.detector import Detector
from medspark.defend.detect.examine import Examination
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import find_layers
from medspark.defend.detect.figures import Scores
from medspark.defend.detect.gather import gather, rows_of
from medspark.defend.detect.registry import grid
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.summary import Arrays

EPS = 38 / 255
OBLIVIOUS = AttackSettings(attacks=("fgsm", "pgd"), eps=(EPS,), steps=5, batch_size=64)
ADAPTIVE = AdaptiveSettings(attacks=("project_detector", "selective"), steps=8, searches=2)


def on_grid(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


class World:
    """Digits in four parts, and the detectors that were fitted and chosen on the first three."""

    def __init__(self, network: nn.Module, digits, names=("kde", "lid", "safetynet")) -> None:
        # The network was trained on digits.images; validation and test images are new to it.
        images = on_grid(torch.cat([digits.images[:420], digits.test_images]))
        labels = torch.cat([digits.labels[:420], digits.test_labels])
        self.network = network.eval().requires_grad_(False)
        known = find_layers(network, images[:1])
        self.head = known.head
        pairs = [(n, lay) for n, lay in grid(names, known.names) if lay not in known.stages[:-1]]
        layers = tuple(dict.fromkeys([*known.names, *(layer for _, layer in pairs)]))
        self.extractor = Extractor.on(network, layers, known.head)

        def gathered(start: int, stop: int, attacks: AttackSettings) -> Arrays:
            rows = torch.arange(start, stop)
            return gather(self.extractor, [(images[rows], labels[rows], rows)], attacks, bits=8)

        linear = network.get_submodule(known.head)
        self.training = training_of(
            gathered(0, 300, OBLIVIOUS.model_copy(update={"attacks": ()})),
            gathered(300, 420, OBLIVIOUS),
            OBLIVIOUS.trials(),
            head=(linear.weight.detach(), linear.bias.detach()),
            seed=0,
        )
        self.detectors = fit_all(pairs, self.training)
        self.validation = gathered(420, 720, OBLIVIOUS)
        self.half = torch.arange(300).numpy() < 100
        self.choosing, self.calibrating = (
            rows_of(self.validation, part) for part in (self.half, ~self.half)
        )
        self.choice: Choice = choose(
            self.detectors, self.choosing, self.calibrating, OBLIVIOUS.trials()
        )
        self.test = images[-64:], labels[-64:], torch.arange(64)

    @cached_property
    def examined(self) -> Arrays:
        """The arrays of the test images."""
        return self.examination().arrays([self.test])

    def examination(
        self, *more: Detector, targets: tuple[Target, ...] | None = None
    ) -> Examination:
        return Examination(
            model=self.network,
            head=self.head,
            detectors=[*self.detectors, *more],
            targets=self.choice.targets if targets is None else targets,
            oblivious=OBLIVIOUS,
            adaptive=ADAPTIVE,
            bits=8,
        )

    def scores(self, arrays: Arrays | None = None, **changes: object) -> Scores:
        scores = Scores(
            arrays=self.examined if arrays is None else arrays,
            detectors=self.detectors,
            targets=self.choice.targets,
            trials=OBLIVIOUS.trials(),
            adaptive=ADAPTIVE.attacks,
            calibration=self.choice.calibration,
            rate=0.05,
        )
        return replace(scores, **changes)  # type: ignore[arg-type]
