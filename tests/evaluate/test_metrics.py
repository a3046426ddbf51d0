"""Figures worked by hand."""

import numpy as np
import pytest

from medspark.evaluate.metrics import class_metrics, metrics

# Three healthy, two ill; one healthy called ill, one ill called healthy.
LABELS = np.array([0, 0, 0, 1, 1])
ILL = np.array([0.1, 0.4, 0.6, 0.9, 0.3])
BINARY = np.stack([1 - ILL, ILL], axis=1)


def test_two_classes() -> None:
    found = metrics(LABELS, BINARY)

    assert found.accuracy == pytest.approx(3 / 5)
    assert found.sensitivity == pytest.approx(1 / 2)
    assert found.specificity == pytest.approx(2 / 3)
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found.auroc == pytest.approx(4 / 6)


def test_the_class_that_counts_as_ill_can_be_named() -> None:
    found = metrics(LABELS, BINARY, positive=0)

    assert found.sensitivity == pytest.approx(2 / 3)
    assert found.specificity == pytest.approx(1 / 2)


def test_several_classes_are_averaged_each_against_the_rest() -> None:
    labels = np.array([0, 1, 2, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.1, 0.2, 0.7]])

    found = metrics(labels, probabilities)

    assert found.sensitivity == found.balanced_accuracy == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert found.specificity == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found.auroc == pytest.approx(1.0)


def test_each_class_has_its_own_figures() -> None:
    healthy, ill = class_metrics(LABELS, BINARY, classes=["healthy", "ill"])

    assert (healthy.name, healthy.sensitivity) == ("healthy", pytest.approx(2 / 3))
    assert (ill.name, ill.sensitivity) == ("ill", pytest.approx(1 / 2))


def test_a_network_that_is_all_too_sure_is_still_ranked() -> None:
    margin = np.array([-40.0, 20.0, 25.0, 30.0, 50.0], dtype=np.float32)
    odds = np.exp(-margin)
    sure = np.stack([odds / (1 + odds), 1 / (1 + odds)], axis=1).astype(np.float32)

    found = metrics(np.array([0, 0, 0, 1, 1]), sure)

    assert (sure[1:, 1] == 1).all()
    assert found.auroc == 1.0


def test_what_the_labels_do_not_define_is_left_out() -> None:
    found = metrics(np.array([0, 0]), BINARY[:2])

    assert found.auroc is None
    assert found.sensitivity is None
    assert found.specificity == 1.0
