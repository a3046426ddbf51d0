"""Features drawn at random, for the tests of detectors."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.defend.detect.detector import Training
from medspark.defend.detect.features import Features

WIDTH, CLASSES = 5, 3


def drawn(
    count: int, seed: int, *, shift: float = 0.0, layers: tuple[str, ...] = ("a",)
) -> Features:
    """Return features of ``count`` images around the means of three classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % CLASSES
    logits = torch.nn.functional.one_hot(classes, CLASSES).float() * 4

    def values() -> Tensor:
        noise = torch.randn(count, WIDTH, generator=generator)
        return noise + 3 * torch.nn.functional.one_hot(classes, WIDTH) + shift

    return Features(logits, {name: values() for name in layers})


def training(*, shift: float = 2.0, layers: tuple[str, ...] = ("a",)) -> Training:
    """Return training images whose attacked features are ``shift`` away."""
    reference = drawn(120, 0, layers=layers)
    generator = torch.Generator().manual_seed(9)
    return Training(
        reference=reference,
        labels=reference.predicted,
        clean=drawn(60, 1, layers=layers),
        noisy=drawn(60, 2, layers=layers),
        attacked=(drawn(60, 3, shift=shift, layers=layers),),
        head=(torch.randn(CLASSES, WIDTH, generator=generator), torch.zeros(CLASSES)),
    )
