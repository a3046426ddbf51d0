"""A judge compares answers with the float graph's, on clean images and on attacked ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import images, network

from medspark.attacks.threat import ThreatModel
from medspark.export.judge import CLEAN, Judge, Verdict, attacked
from medspark.models.prediction import Floats

LOGITS = np.stack([np.linspace(-1, 1, 100), np.zeros(100)], axis=1).astype(np.float32)
BATCH = images(100).numpy()


def _reading(logits: Floats) -> Judge:
    """Return the judge of images whose true classes are the answers of ``logits``."""
    return Judge(BATCH[: len(logits)], logits.argmax(1), logits)


@given(st.integers(0, 50))
def test_answers_are_kept_only_if_nearly_all_are(wrong: int) -> None:
    found = LOGITS.copy()
    found[:wrong] = found[:wrong, ::-1]
    parts = iter(np.array_split(found, [32, 64, 96]))

    verdict = _reading(LOGITS).verdict(lambda _: next(parts))

    assert (verdict.agreement == 1) is (wrong == 0)
    assert verdict.fall == pytest.approx(wrong / 100)
    # One image of a hundred may differ, but not if it makes the network worse by more than .005.
    assert verdict.keeps_answers is (wrong == 0)


@pytest.mark.parametrize(
    ("agreement", "fall", "kept"),
    [(0.99, 0.005, True), (0.98, 0, False), (1, 0.01, False), (1, -1, True)],
)
def test_a_graph_may_be_better_but_not_different(agreement, fall, kept: bool) -> None:
    assert Verdict(agreement, fall, CLEAN).keeps_answers is kept


def test_an_error_on_one_image_is_one_that_any_image_could_have() -> None:
    leads = np.array([0.1, 3.0], np.float32)
    logits = np.stack([leads, np.zeros(2, np.float32)], axis=1)
    moved = logits - np.array([[0, 0], [1, 0]], np.float32)  # the sure image stays right

    verdict = _reading(logits).verdict(lambda _: moved)

    assert verdict.fall == 0
    assert verdict.agreement == 0.75  # one image of two would change with one error of two


def test_attacked_images_are_within_the_budget_and_harder_than_clean_ones() -> None:
    made, batch = network(), images(40)
    with torch.no_grad():
        logits = made(batch)
    threat = ThreatModel(eps=4 / 255)

    found = torch.from_numpy(
        attacked(
            Judge(batch.numpy(), logits.argmax(1).numpy(), logits.numpy()), made, threat, most=35
        )
    )

    assert threat.holds(found, batch[:35]).all()
    with torch.no_grad():
        sure = [made(each).diff(dim=1).abs().mean() for each in (found, batch[:35])]
    assert sure[0] < sure[1]
