"""Figures of an attack: what success is measured on, detection, and how long a backdoor lasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medspark.federate.adversary.config import AdversaryConfig
from medspark.federate.backdoor import Probe, RoundOfAttack, detection, lasting, probe
from medspark.federate.edge import EdgeImages

IMAGES, LABELS = torch.zeros(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
EDGE = EdgeImages(torch.full((4, 1, 8, 8), 0.5), torch.tensor([1, 1, 0, 2]))


class Brightest(nn.Module):
    """Assigns white pixels in the middle of the lower right corner to class 0, others to 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, 0, 5, 5]
        return torch.stack([bright, 0.6 - 0 * bright], 1)


def found(name: Any, **settings: Any) -> Probe | None:
    config = AdversaryConfig(name=name, edge="phantom")
    return probe(config, IMAGES, LABELS, edge=EDGE, **settings)


@pytest.mark.parametrize("name", ["badnets", "dba", "neurotoxin", "a3fl"])
def test_triggers_are_measured_on_stamped_images_of_other_classes(name: str):
    measured = found(name)

    assert measured is not None
    assert len(measured.images) == 4
    assert measured.success(Brightest()) == 1


def test_a_prepared_trigger_is_what_is_stamped():
    measured = found("a3fl", pattern=torch.full((1, 5, 5), 0.2))

    assert measured is not None
    assert measured.success(Brightest()) == 0


@pytest.mark.parametrize("name", ["edge_case", "projected", "replacement", "none"])
def test_edge_cases_are_measured_on_tail_images_of_other_classes(name: str):
    measured = found(name)

    assert measured is not None
    assert len(measured.images) == 3
    assert measured.success(Brightest()) == 0


@pytest.mark.parametrize("name", ["label_flip", "sign_flip", "alie", "ipm", "nan"])
def test_attacks_without_a_target_have_no_success(name: str):
    assert found(name) is None


def test_measuring_leaves_the_mode_of_a_network():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2)).train()

    Probe(IMAGES, 0).success(model)

    assert model[1].training


def test_detection_counts_updates_of_rounds_in_which_the_rule_detects():
    rounds = [
        (RoundOfAttack(malicious=(1, 2), rejected=(1, 5)), (1, 2, 4, 5)),
        (RoundOfAttack(malicious=(2,), rejected=(2,)), (2, 4, 6)),
        (RoundOfAttack(malicious=(1,), rejected=None), (1, 4)),
    ]

    figures = detection(rounds)

    assert figures.tpr == pytest.approx(2 / 3)
    assert figures.fpr == pytest.approx(1 / 4)


def test_a_rate_of_nobody_is_none():
    figures = detection([(RoundOfAttack(rejected=()), (3, 4))])

    assert (figures.tpr, figures.fpr) == (None, 0)


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_who_rejects_exactly_the_malicious_has_perfect_rates(liars: set[int], honest: set[int]):
    attack = RoundOfAttack(malicious=tuple(liars), rejected=tuple(liars))

    figures = detection([(attack, liars | honest)])

    assert figures.tpr in (None, 1)
    assert figures.fpr in (None, 0)


def test_success_after_the_attack_is_that_of_its_round():
    successes = {0: 0.1, 1: 0.9, 2: 0.8, 3: None}

    assert lasting(successes, stopped=2, rounds=0) == 0.9
    assert lasting(successes, stopped=2, rounds=1) == 0.8
    assert lasting(successes, stopped=2, rounds=9) is None
    assert lasting(successes, stopped=2, rounds=1, over=2) == pytest.approx(0.85)
    assert lasting(successes, stopped=2, rounds=2, over=3) is None
