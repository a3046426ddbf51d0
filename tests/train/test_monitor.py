"""The monitor sees overfitting to FGSM and label leaking, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medspark.models.classifier import Classifier
from medspark.train.adversarial import Sample
from medspark.train.config import MonitorConfig
from medspark.train.monitor import Monitor, Sight, look


def judged(*sights: Sight, clean: float = 0.9, attacked: float = 0.8) -> str | None:
    monitor = Monitor(MonitorConfig())
    alarms = [monitor.judge(sight, clean=clean, attacked=attacked) for sight in sights]
    return None if alarms[-1] is None else alarms[-1].cause


@pytest.mark.parametrize(
    "sights",
    [
        [Sight(0.95, 0.9, 0.1)],
        [Sight(0.9, 0.8, 0.7), Sight(0.9, 0.6, 0.45)],
        [Sight(0.9, 0.8, 0.7), Sight(0.9, 0.75, 0.6), Sight(0.9, 0.6, 0.45)],
    ],
)
def test_overfitting_to_fgsm_is_seen(sights: list[Sight]):
    assert judged(*sights) == "catastrophic overfitting"


def test_label_leaking_is_seen():
    assert judged(Sight(0.9, 0.8, 0.7), clean=0.73, attacked=0.88) == "label leaking"


@pytest.mark.parametrize("clean", [0.9, 0.0])
def test_sound_training_raises_no_alarm(clean: float):
    assert judged(Sight(0.9, 0.7, 0.6), Sight(0.92, 0.75, 0.68), clean=clean) is None


def test_looking_leaves_no_trace(tiny: Callable[..., Classifier], sample: Callable[..., Sample]):
    model, given = tiny().double().train(), sample()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    sight = look(model, given.images, given.labels, threat=given.threat, steps=3)

    assert 0 <= sight.pgd <= sight.clean <= 1
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
