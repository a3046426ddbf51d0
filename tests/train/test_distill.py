"""Each distillation method has the gradient of its equation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.attacks.losses import cross_entropy
from medspark.attacks.pgd import pgd
from medspark.models.classifier import Classifier
from medspark.train.adversarial import take_step
from medspark.train.config import AdversarialConfig, DistillConfig, FitConfig
from medspark.train.distill import distillation_rule
from medspark.train.learner import Learner, Sample, StepStats
from medspark.train.noise import keyed_noise
from medspark.train.objective import CrossEntropy

Tiny = Callable[..., Classifier]
Make = Callable[..., Sample]


def learnt(tiny: Tiny, given: Sample, **chosen: object) -> tuple[StepStats, Classifier, Classifier]:
    teacher, student = tiny(seed=1).double().eval(), tiny(seed=2).double().eval()
    config = DistillConfig.model_validate({"teacher": Path("unused"), **chosen})
    learner = Learner(
        student,
        CrossEntropy(),
        AdversarialConfig(inner_steps=3),
        step_rule=distillation_rule(config, teacher),
    )
    return take_step(learner, given), teacher, student


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def test_kd_mixes_hard_labels_and_softened_answers(tiny: Tiny, sample: Make):
    given = sample()
    stats, teacher, student = learnt(tiny, given, method="kd")
    logits = student(given.images)

    hard = F.cross_entropy(logits, given.labels)
    soft = 16 * divergence(teacher(given.images), logits, 4)

    assert stats.loss == pytest.approx(float((0.3 * hard + 0.7 * soft).detach()))


def test_defensive_learns_soft_labels_at_the_temperature(tiny: Tiny, sample: Make):
    given = sample()
    stats, teacher, student = learnt(tiny, given, method="defensive", temperature=20)

    target = (teacher(given.images) / 20).softmax(1)
    expected = -(target * (student(given.images) / 20).log_softmax(1)).sum(1).mean()

    assert stats.loss == pytest.approx(float(expected.detach()))


def test_the_defensive_teacher_learns_at_a_temperature_of_its_own(tiny: Tiny, sample: Make):
    given = sample()
    network = tiny(seed=1).double()
    plain, hot = (
        take_step(
            Learner(network, CrossEntropy(temperature=heat), AdversarialConfig(mode="standard")),
            given,
        )
        for heat in (1.0, 20.0)
    )

    logits = network(given.images).detach()
    assert plain.loss == pytest.approx(float(F.cross_entropy(logits, given.labels)))
    assert hot.loss == pytest.approx(float(F.cross_entropy(logits / 20, given.labels)))


@pytest.mark.parametrize(("method", "temperature"), [("ard", 30), ("rslad", 1)])
def test_robust_students_match_clean_answers_on_attacked_images(
    method: str, temperature: float, tiny: Tiny, sample: Make
):
    given = sample()
    stats, teacher, student = learnt(tiny, given, method=method)
    assert stats.attacked is not None
    answers = teacher(given.images)
    on_attacked = divergence(answers, student(stats.attacked), temperature)
    on_clean = divergence(answers, student(given.images), temperature)

    expected = 900 * on_attacked if method == "ard" else (5 * on_attacked + on_clean) / 6

    assert stats.loss == pytest.approx(float(expected.detach()))
    assert given.threat.holds(stats.attacked, given.images).all()


def test_rslad_attacks_the_teachers_answers(tiny: Tiny, sample: Make):
    given = sample()
    stats, teacher, student = learnt(tiny, given, method="rslad")
    assert stats.attacked is not None
    answers = teacher(given.images)

    before = divergence(answers, student(given.images), 1)
    after = divergence(answers, student(stats.attacked), 1)

    assert after > before


@pytest.mark.parametrize(("method", "learning"), [("ard", 1), ("rslad", 2)])
def test_the_students_weights_take_part_in_the_passes_that_it_learns_from_alone(
    method: str, learning: int, tiny: Tiny, sample: Make
):
    student, passes = tiny(seed=1).double(), []
    student.register_forward_hook(
        lambda module, *_: passes.append(all(p.requires_grad for p in module.parameters()))
    )
    config = DistillConfig(teacher=Path("unused"), method=method)
    taught = distillation_rule(config, tiny().double().eval())
    chosen = AdversarialConfig(inner_steps=3)
    take_step(Learner(student, CrossEntropy(), chosen, step_rule=taught), sample())

    assert sorted(passes) == 3 * [False] + learning * [True]


@pytest.mark.parametrize("method", ["kd", "defensive", "ard", "rslad"])
def test_the_teacher_is_left_as_it_is(method: str, tiny: Tiny, sample: Make):
    _, teacher, student = learnt(tiny, sample(), method=method)

    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("method", ["ard", "rslad"])
def test_the_attack_is_pgd_on_the_loss_of_the_method(method: str, tiny: Tiny, sample: Make):
    given = sample()
    teacher, student = tiny(seed=1).double().eval(), tiny(seed=2).double().eval()
    config = DistillConfig(teacher=Path("unused"), method=method)
    learner = Learner(
        student,
        CrossEntropy(),
        AdversarialConfig(inner_steps=4),
        step_rule=distillation_rule(config, teacher),
    )
    said = teacher(given.images).detach().softmax(1)

    def away_from_the_teacher(logits: Tensor, _: Tensor) -> Tensor:
        return (said * (said / logits.softmax(1)).log()).sum(1)

    loss = {"ard": cross_entropy, "rslad": away_from_the_teacher}[method]
    noise = keyed_noise(given.images, given.rows, key=given.key)
    start = given.threat.random_start(given.images, (noise + 1) / 2)
    expected = pgd(
        student, given.images, given.labels, threat=given.threat, steps=4, start=start, loss=loss
    )

    attacked = take_step(learner, given).attacked

    torch.testing.assert_close(attacked, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("method", ["kd", "ard", "rslad"])
def test_alpha_is_the_weight_of_the_teachers_part_also_where_it_is_0(
    method: str, alpha: float, tiny: Tiny, sample: Make
):
    given = sample()
    stats, teacher, student = learnt(tiny, given, method=method, alpha=alpha, temperature=2.0)
    answers, clean = teacher(given.images), student(given.images)
    hard = F.cross_entropy(clean, given.labels)
    shown = given.images if stats.attacked is None else stats.attacked
    soft = divergence(answers, student(shown), 2.0)

    expected = {
        "kd": (1 - alpha) * hard + alpha * 4 * soft,
        "ard": (1 - alpha) * hard + alpha * 4 * soft,
        "rslad": (1 - alpha) * divergence(answers, clean, 2.0) + alpha * soft,
    }[method]

    assert float(stats.loss) == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("method", ["kd", "defensive", "ard", "rslad"])
def test_a_sample_counts_by_its_weight(method: str, tiny: Tiny, sample: Make):
    single, double = (
        learnt(tiny, replace(sample(), weight=weight), method=method)[0] for weight in (1.0, 2.0)
    )

    assert float(double.loss) == pytest.approx(2 * float(single.loss))


def test_defensive_teaches_at_fifty_where_nothing_is_said(tiny: Tiny, sample: Make):
    by_default, at_fifty = (
        learnt(tiny, sample(), method="defensive", **chosen)[0].loss
        for chosen in ({}, {"temperature": 50})
    )

    assert float(by_default) == float(at_fifty)


@pytest.mark.parametrize(
    ("method", "robust"), [("kd", False), ("defensive", False), ("ard", True), ("rslad", True)]
)
def test_students_of_robust_methods_are_judged_under_attack(method: str, robust: bool):
    config = {"shards": "s", "distill": {"teacher": "t", "method": method}}

    assert FitConfig.model_validate(config).attacks == robust
