"""Parity: how far answers are apart, and the flags on what looks too good."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.result import AttackFigures, ConditionFigures, RobustnessResult
from medspark.export.parity import flags, parity

LABELS = np.array([0, 1] * 50)
LOGITS = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)


def _report(*, clean: int, held: int) -> RobustnessResult:
    """Return a result of 100 images, so many of them right when clean and under attack."""
    worst = AttackFigures(name="worst_case", steps=0, eps=2 / 255, accuracy=held / 100)
    figures = ConditionFigures(accuracy=clean / 100)
    return RobustnessResult(images=100, clean=figures, worst_case=(worst,))


@given(st.floats(-30, 30), st.booleans())
def test_the_same_logits_or_shifted_ones_are_the_same_answers(shift: float, findings: bool) -> None:
    labels = np.eye(2)[LABELS] if findings else LABELS

    found = parity(labels, LOGITS, LOGITS if findings else LOGITS + np.float32(shift))

    assert found.images == 100
    assert found.largest_difference < 1e-5
    assert found.same_answers == 1


@given(st.integers(0, 100))
def test_other_answers_are_counted(count: int) -> None:
    other = np.where(np.arange(100)[:, None] < count, LOGITS[:, ::-1], LOGITS)

    found = parity(LABELS, LOGITS, other)

    assert found.same_answers == pytest.approx(1 - count / 100)
    assert found.mean_difference <= found.largest_difference


@pytest.mark.parametrize(
    ("clean", "held", "flagged"),
    [(90, 50, False), (90, 51, False), (90, 53, True), (93, 53, False), (80, 53, True)],
)
def test_more_robust_than_its_twin_is_flagged_unless_it_is_right_more_often(
    clean: int, held: int, flagged: bool
) -> None:
    found = flags(
        parity(LABELS, LOGITS, LOGITS), "int8", _report(clean=90, held=50),
        _report(clean=clean, held=held),
    )  # fmt: skip

    assert [flag.triggered for flag in found] == [False, flagged]
    assert found[1].name == "more_robust_than_twin_at_2_255"


@pytest.mark.parametrize(("precision", "change", "flagged"), [
    ("fp32", 1e-3, True), ("fp32", 1e-6, False), ("int8", 1e-3, False), ("int8", 9.0, True),
])  # fmt: skip
def test_a_float_export_has_to_be_exact_and_an_int8_one_to_agree(
    precision, change, flagged
) -> None:
    changed = LOGITS + np.float32(change) * np.array([[1, -1]], np.float32)
    report = _report(clean=90, held=50)

    answers, _ = flags(parity(LABELS, LOGITS, changed), precision, report, report)

    assert answers.triggered is flagged
