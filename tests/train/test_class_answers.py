"""Mode ikl is its formula, and its mean answers per class are those of the epoch before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from tiny_network import ALONE, build_sample, build_tiny, engine_for
from torch import Tensor

from medspark.data.batch import Batch
from medspark.train.adversarial import take_step
from medspark.train.class_answers import ClassAnswers
from medspark.train.config import AdversarialConfig
from medspark.train.ikl_config import IklConfig
from medspark.train.learner import Learner, Sample
from medspark.train.objective import CrossEntropy, pair_distance

Make = Callable[..., Sample]
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 0.0], [0.0, -2.0, 1.0], [0.5, 0.5, 4.0]])
LABELS = torch.tensor([0, 1, 0, 1])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given_any(st.integers(0, 2**31), st.integers(2, 6))
def test_the_distance_of_pairs_is_the_sum_over_all_pairs(seed: int, classes: int):
    clean, attacked, raw = drawn(seed, 3, 4, classes)
    weights = raw.softmax(1)
    expected = torch.zeros(4, dtype=torch.float64)
    for j in range(classes):
        for k in range(classes):
            apart = (clean[:, j] - clean[:, k]) - (attacked[:, j] - attacked[:, k])
            expected += weights[:, j] * weights[:, k] * apart.square()

    torch.testing.assert_close(pair_distance(clean, attacked, weights), expected)


def test_in_the_first_epoch_all_answers_count_alike():
    answers = ClassAnswers()
    answers.begin(0, ALONE)

    assert torch.equal(answers.of(LOGITS, LABELS), torch.full((4, 3), 1 / 3))


def test_afterwards_they_are_the_mean_softened_answers_to_the_class():
    answers = ClassAnswers(IklConfig(temperature=2.0))
    answers.begin(0, ALONE)
    for part in (slice(0, 1), slice(1, 4)):
        answers.of(LOGITS[part], LABELS[part])

    answers.begin(1, ALONE)

    soft = (LOGITS / 2).softmax(1)
    means = torch.stack([(soft[0] + soft[2]) / 2, (soft[1] + soft[3]) / 2])
    found = answers.of(LOGITS[:3], torch.tensor([1, 0, 2]))
    torch.testing.assert_close(found[:2], means[[1, 0]], rtol=0, atol=1e-4)
    # No image of the last class was seen: its answers are as before.
    torch.testing.assert_close(found[2], torch.full((3,), 1 / 3))


def test_the_means_of_an_epoch_stay_while_it_lasts():
    answers = ClassAnswers()
    answers.begin(0, ALONE)
    answers.of(LOGITS, LABELS)
    answers.begin(1, ALONE)
    first = answers.of(-LOGITS, LABELS)
    answers.share(ALONE)
    answers.begin(1, ALONE)

    assert torch.equal(answers.of(LOGITS, LABELS), first)
    answers.begin(2, ALONE)
    assert not torch.equal(answers.of(LOGITS, LABELS), first)


@settings(max_examples=30)
@given_any(st.integers(0, 2**31), st.permutations(range(12)), st.lists(st.integers(0, 12)))
def test_the_means_are_the_same_bits_in_any_order_and_any_pieces(
    seed: int, order: list[int], cuts: list[int]
):
    logits, labels = drawn(seed, 12, 3), torch.arange(12) % 3
    whole, parts = ClassAnswers(), ClassAnswers()
    whole.of(logits, labels)
    bounds = [0, *sorted(cuts), 12]
    for start, stop in pairwise(bounds):
        chosen = torch.tensor(order[start:stop], dtype=torch.int64)
        parts.of(logits[chosen], labels[chosen])
        parts.share(ALONE)
    for answers in (whole, parts):
        answers.begin(1, ALONE)

    assert torch.equal(whole.of(logits, labels), parts.of(logits, labels))


def test_a_mixed_image_counts_for_each_class_with_its_share():
    shares = torch.tensor([[[0.25, 0.75, 0.0]]])
    answers = ClassAnswers(IklConfig(temperature=1.0))
    answers.of(torch.cat([LOGITS[:1], LOGITS[:1]]), torch.cat([shares, shares]))
    answers.of(LOGITS[1:2], torch.tensor([0]))
    answers.begin(1, ALONE)

    soft = LOGITS.softmax(1)
    found = answers.of(LOGITS[:1], torch.tensor([0]))
    expected = (2 * 0.25 * soft[:1] + soft[1:2]) / 1.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def learnt(learner: Learner, given: Sample) -> list[Tensor]:
    learner.model.zero_grad()
    take_step(learner, given)
    return [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 20.0), (1.0, 0.0), (0.0, 3.0)])
def test_ikl_has_the_gradient_of_its_formula(alpha: float, beta: float, sample: Make):
    model, given = build_tiny().double().eval(), sample()
    config = AdversarialConfig(mode="ikl", inner_steps=3)
    answers = ClassAnswers(IklConfig(alpha=alpha, beta=beta))
    learner = Learner(model, CrossEntropy(), config, answers=answers)
    learnt(learner, given)
    answers.begin(1, ALONE)

    found = learnt(learner, given)

    weights = answers.of(model(given.images), given.labels)
    assert not torch.allclose(weights, torch.full_like(weights, 0.5), atol=1e-3)
    trades = Learner(build_tiny().double().eval(), CrossEntropy(), replace_mode(config))
    attacked = take_step(trades, given).attacked
    model.zero_grad()
    clean, adversarial = model(given.images), model(attacked)
    soft = -(clean.softmax(1).detach() * adversarial.log_softmax(1)).sum(1)
    gaps = [logits[:, :, None] - logits[:, None] for logits in (clean, adversarial)]
    pairs = (weights[:, :, None] * weights[:, None] * (gaps[0] - gaps[1]).square()).sum((1, 2))
    loss = F.cross_entropy(clean, given.labels) + (alpha * soft + beta / 4 * pairs).mean()
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, expected)


def replace_mode(config: AdversarialConfig) -> AdversarialConfig:
    return config.model_copy(update={"mode": "trades"})


def batch_for(epoch: int, step: int) -> Batch:
    given = build_sample()
    images = (given.images * 255).to(torch.uint8)
    return Batch(images, given.labels, np.arange(10), 1.0, 10, epoch, step)


def test_an_engine_saved_within_or_between_epochs_goes_on_as_if_it_had_not_stopped():
    plan = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for stop in (1, 2, 3):
        unbroken, resumed = (
            engine_for(build_tiny().eval(), mode="ikl", inner_steps=1, steps=6, lr=0.02)
            for _ in range(2)
        )
        for number, place in enumerate(plan[:stop]):
            unbroken.step(batch_for(*place), number)
        unbroken.average_buffers()
        resumed.restore({name: tensor.clone() for name, tensor in unbroken.tensors().items()})
        for number, place in list(enumerate(plan))[stop:]:
            for engine in (unbroken, resumed):
                engine.step(batch_for(*place), number)
        for engine in (unbroken, resumed):
            engine.average_buffers()
        left, right = unbroken.tensors(), resumed.tensors()
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_the_means_decide_what_an_engine_learns():
    trained = []
    for epochs in ((0, 0, 0), (0, 1, 2)):
        engine = engine_for(build_tiny().eval(), mode="ikl", inner_steps=1, lr=0.1, lr_rise=0.0)
        for number, epoch in enumerate(epochs):
            engine.step(batch_for(epoch, 0), number)
        trained.append(engine.tensors()["model/backbone.3.weight"].clone())

    assert not torch.equal(*trained)


def test_without_an_attack_the_clean_loss_alone_is_left(sample: Make):
    model = build_tiny().double().eval()
    given = sample()
    given = replace(given, threat=given.threat.model_copy(update={"eps": 0.0}))
    plain = learnt(Learner(model, CrossEntropy(), AdversarialConfig(mode="standard")), given)

    answers = ClassAnswers(IklConfig(alpha=3.0, beta=5.0))
    learner = Learner(model, CrossEntropy(), AdversarialConfig(mode="ikl"), answers=answers)
    found = learnt(learner, given)

    # -sum softmax(z) log softmax(z') has no slope in z' at z' = z.
    torch.testing.assert_close(found, plain)
