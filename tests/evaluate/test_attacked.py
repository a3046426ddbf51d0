"""Attacked images are yielded batch by batch, and are those that a report describes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medspark.attacks.losses import probabilities
from medspark.errors import UsageError
from medspark.evaluate.attacked import attacked_batches
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import Batch, attack_all

ATTACKS = ("fgsm", "pgd", "square")


def batches_of(count: int, size: int) -> list[Batch]:
    images = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(count))
    parts = images, torch.arange(count) % 3, torch.arange(count) + 50
    return list(zip(*(part.split(size) for part in parts), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 9),
    size=st.integers(1, 9),
    eps=st.sets(st.sampled_from([0.0, 2 / 255, 0.1]), min_size=1, max_size=2),
)
def test_attacked_images_lie_in_the_ball_and_give_the_answers_that_the_arrays_record(
    count: int, size: int, eps: set[float]
) -> None:
    chosen = {"attacks": ATTACKS, "eps": tuple(eps), "steps": 2, "queries": 5, "sanity_images": 0}
    model, config = network(), AttackSettings.model_validate(chosen)
    arrays = attack_all(model, batches_of(count, size), config)

    handed = list(attacked_batches(model, batches_of(count, size), config))

    assert len(handed) == -(-count // size) * len(ATTACKS) * len(eps)
    for found in handed:
        recorded = arrays[found.trial.key][found.clean.rows.numpy() - 50]
        again = probabilities(model(found.images), found.clean.labels).detach()
        assert found.threat.holds(found.images, found.clean.pixels).all()
        assert found.threat.eps == found.trial.eps
        np.testing.assert_array_equal(probabilities(found.logits, found.clean.labels), recorded)
        torch.testing.assert_close(again, torch.from_numpy(recorded), rtol=1e-4, atol=1e-5)


def test_no_batch_is_asked_for_before_the_one_before_it_is_done() -> None:
    taken = []

    def batches():
        for batch in batches_of(6, 2):
            taken.append(batch)
            yield batch

    config = AttackSettings(attacks=("fgsm",), eps=(0.1, 0.2), sanity_images=0)
    handed = attacked_batches(network(), batches(), config)

    assert len(list(itertools.islice(handed, 2))) == 2
    assert len(taken) == 1


def test_an_attack_that_needs_gradients_is_refused_where_there_are_none() -> None:
    model = network()
    model.gradients = False

    with pytest.raises(UsageError, match="fgsm cannot run on a model without gradients"):
        next(attacked_batches(model, batches_of(2, 2), AttackSettings(attacks=("fgsm",))))
