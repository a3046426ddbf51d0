"""One finding is learnt exactly as two classes are, and several as the mean of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.models.classifier import Classifier
from medspark.train.adversarial import MODES, Learner, Sample, take_step
from medspark.train.config import AdversarialConfig, DistillConfig
from medspark.train.distill import lesson
from medspark.train.objective import (
    BinaryCrossEntropy,
    CrossEntropy,
    balanced_positive_weights,
    balanced_weights,
    divergence,
)

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


class Difference(nn.Module):
    """Of a network with two classes, the one logit (B, 1) that tells them apart."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return logits[:, 1:] - logits[:, :1]


def as_finding(given: Sample) -> Sample:
    return replace(given, labels=given.labels[:, None].to(given.images.dtype))


def gradients(learner: Learner, given: Sample) -> list[Tensor]:
    take_step(learner, given)
    return [p.grad for p in learner.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_one_finding_as_it_learns_two_classes(
    mode: str, tiny: Tiny, sample: Make
):
    config = AdversarialConfig(mode=mode, inner_steps=3, gradalign=0.1)
    classes = Learner(tiny().double(), CrossEntropy(label_smoothing=0.1), config)
    finding = Learner(Difference(tiny().double()), BinaryCrossEntropy(label_smoothing=0.1), config)

    left, right = gradients(classes, sample()), gradients(finding, as_finding(sample()))

    assert left
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("method", ["kd", "defensive", "ard", "rslad"])
def test_every_distillation_teaches_one_finding_as_it_teaches_two_classes(
    method: str, tiny: Tiny, sample: Make
):
    config = DistillConfig(teacher=Path("unused"), method=method, alpha=0.6)
    steps = AdversarialConfig(inner_steps=3)
    teacher, of_finding = tiny(seed=1).double().eval(), Difference(tiny(seed=1).double().eval())
    classes = Learner(
        tiny().double(), CrossEntropy(temperature=2), steps, lesson=lesson(config, teacher)
    )
    finding = Learner(
        Difference(tiny().double()),
        BinaryCrossEntropy(temperature=2),
        steps,
        lesson=lesson(config, of_finding),
    )

    left, right = gradients(classes, sample()), gradients(finding, as_finding(sample()))

    assert left
    torch.testing.assert_close(left, right)


def test_several_findings_are_the_mean_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, 3, generator=generator).double()
    labels = torch.randint(0, 2, (7, 3), generator=generator).double()
    each = [F.binary_cross_entropy_with_logits(logits[:, k], labels[:, k]) for k in range(3)]
    p, q = logits.sigmoid(), other.sigmoid()
    apart = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()

    torch.testing.assert_close(BinaryCrossEntropy()(logits, labels), sum(each) / 3)
    torch.testing.assert_close(divergence(logits, other, labels), apart.mean(1))


def test_balanced_weights_ask_for_the_same_ratio_in_either_form() -> None:
    negative, positive = balanced_weights([30, 10])

    (weight,) = balanced_positive_weights([10], 40)

    assert weight == positive / negative == 3
    assert balanced_positive_weights([0, 40], 40).isfinite().all()
