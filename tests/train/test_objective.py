"""One finding is learnt exactly as two classes are, and several as the mean of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medspark.models.classifier import Classifier
from medspark.train.adversarial import MODES, take_step
from medspark.train.config import AdversarialConfig, DistillConfig
from medspark.train.distill import distillation_rule
from medspark.train.learner import Learner, Sample
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


# ikl weighs by classes; trainings with findings refuse it.
@pytest.mark.parametrize("mode", sorted(set(MODES) - {"ikl"}))
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
        tiny().double(),
        CrossEntropy(temperature=2),
        steps,
        step_rule=distillation_rule(config, teacher),
    )
    finding = Learner(
        Difference(tiny().double()),
        BinaryCrossEntropy(temperature=2),
        steps,
        step_rule=distillation_rule(config, of_finding),
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


logits_of_five = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 4.0]).double()])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_of_classes_is_the_weighted_sum_over_the_number_of_images(
    weights: Tensor | None, smoothing: float, temperature: float
) -> None:
    labels = torch.tensor([0, 2, 1, 1, 0])
    said = (logits_of_five / temperature).log_softmax(1)
    each = torch.ones(3).double() if weights is None else weights
    target = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3

    loss = CrossEntropy(weights, smoothing, temperature)(logits_of_five, labels)

    torch.testing.assert_close(loss, -(target * each * said).sum() / 5)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 4.0]).double()])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_of_findings_weighs_their_positives(
    weights: Tensor | None, smoothing: float, temperature: float
) -> None:
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]])
    likely = (logits_of_five / temperature).sigmoid()
    each = torch.ones(3).double() if weights is None else weights
    target = (1 - smoothing) * labels + smoothing / 2

    loss = BinaryCrossEntropy(weights, smoothing, temperature)(logits_of_five, labels)

    expected = -(each * target * likely.log() + (1 - target) * (1 - likely).log())
    torch.testing.assert_close(loss, expected.mean())


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_balanced_weights_let_every_class_count_alike_and_the_mean_image_one(
    counts: list[int],
) -> None:
    weights = balanced_weights(counts).double()

    shares = weights * torch.tensor(counts)
    torch.testing.assert_close(shares, shares[:1].expand(len(counts)), rtol=1e-4, atol=0)
    assert float(shares.sum() / sum(counts)) == pytest.approx(1, rel=1e-4)


def test_a_finding_of_few_images_weighs_as_much_as_all_the_others() -> None:
    assert balanced_positive_weights([10, 50, 90], 100).tolist() == pytest.approx([9, 1, 1 / 9])


@given(st.integers(1, 70), st.integers(2, 12), st.integers(0, 2**31))
def test_torchs_mean_has_the_bits_of_the_sum_over_the_images(images: int, classes: int, seed: int):
    torch.manual_seed(seed)
    logits, labels = torch.randn(images, classes), torch.randint(0, classes, (images,))
    ones = torch.ones(classes)

    plain, weighted = (
        torch.func.grad_and_value(CrossEntropy(weights))(logits, labels) for weights in (None, ones)
    )

    assert torch.equal(plain[0], weighted[0])
    assert torch.equal(plain[1], weighted[1])
