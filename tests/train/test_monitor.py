"""The monitor detects overfitting to FGSM and label leaking, without false alarms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.attacks.threat import ThreatModel
from medspark.models.classifier import Classifier
from medspark.train.config import MonitorConfig
from medspark.train.learner import Sample
from medspark.train.monitor import Accuracies, Monitor, attack_watched


def judged(*epochs: Accuracies, clean: float = 0.9, attacked: float = 0.8) -> str | None:
    monitor = Monitor(MonitorConfig())
    alarms = [monitor.judge(found, clean=clean, attacked=attacked) for found in epochs]
    return None if alarms[-1] is None else alarms[-1].cause


@pytest.mark.parametrize(
    "epochs",
    [
        [Accuracies(0.95, 0.9, 0.1)],
        [Accuracies(0.9, 0.8, 0.7), Accuracies(0.9, 0.6, 0.45)],
        [
            Accuracies(0.9, 0.8, 0.7),
            Accuracies(0.9, 0.75, 0.6),
            Accuracies(0.9, 0.6, 0.45),
        ],
    ],
)
def test_overfitting_to_fgsm_is_seen(epochs: list[Accuracies]):
    assert judged(*epochs) == "catastrophic overfitting"


def test_label_leaking_is_seen():
    assert judged(Accuracies(0.9, 0.8, 0.7), clean=0.73, attacked=0.88) == "label leaking"


@pytest.mark.parametrize("clean", [0.9, 0.0])
def test_sound_training_raises_no_alarm(clean: float):
    assert judged(Accuracies(0.9, 0.7, 0.6), Accuracies(0.92, 0.75, 0.68), clean=clean) is None


def test_watched_images_leave_no_trace(
    tiny: Callable[..., Classifier], sample: Callable[..., Sample]
):
    model, given = tiny().double().train(), sample()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = attack_watched(model, given.images, given.labels, threat=given.threat, steps=3)

    assert 0 <= found.pgd <= found.clean <= 1
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def cause(found: Accuracies, *, best: float = 0.0, clean: float = 0.9, attacked: float = 0.5):
    alarm = Monitor(MonitorConfig(), best=best).judge(found, clean=clean, attacked=attacked)
    return None if alarm is None else alarm.cause


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_overfitting_is_a_gap_between_the_attacks_or_a_fall_below_the_best(
    clean: float, fgsm: float, pgd: float, best: float
):
    seen = cause(Accuracies(clean, fgsm, pgd), best=best) is not None

    assert seen == (fgsm - pgd > 0.25 or best - pgd > 0.2)


@given(st.floats(0, 1), st.floats(0, 1))
def test_leaking_is_training_accuracy_that_is_higher_under_attack(clean: float, attacked: float):
    seen = cause(Accuracies(0.9, 0.5, 0.5), clean=clean, attacked=attacked)

    leaks = clean > 0 and clean < attacked - 0.05
    assert seen == ("label leaking" if leaks else None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_best_is_the_best_of_all_that_was_seen(figures: list[float]):
    monitor = Monitor(MonitorConfig())

    for pgd in figures:
        monitor.judge(Accuracies(1.0, pgd, pgd), clean=0.9, attacked=0.5)

    assert monitor.best == max(figures)


def test_each_accuracy_is_that_of_its_attack():
    class Square(torch.nn.Module):
        """Right on images as they are; one long step goes past what many short ones find."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1).mean(1)
            away = (x - 0.5).abs()
            wrong = torch.where(away < 0.06, 20 * away - 0.6, 0.6 - 20 * (away - 0.06))
            return torch.stack([-wrong, wrong], dim=1)

    images = torch.full((4, 1, 2, 2), 0.51)
    labels = torch.zeros(4, dtype=torch.long)

    found = attack_watched(Square(), images, labels, threat=ThreatModel(eps=0.11), steps=10)

    assert found == Accuracies(clean=1.0, fgsm=1.0, pgd=0.0)
