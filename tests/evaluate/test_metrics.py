"""Figures worked by hand."""

import numpy as np
import pytest
from sklearn import metrics as sklearn

from medspark.evaluate.answers import answers_of
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


def test_the_lead_is_over_the_next_best_answer_and_negative_where_that_is_given() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.2, 0.35, 0.45]])

    answers = answers_of(np.array([0, 0, 2]), probabilities)

    assert answers.lead == pytest.approx([0.2, -0.5, 0.1])
    assert answers.confidence == pytest.approx([0.5, 0.7, 0.45])
    assert answers.right.tolist() == [True, False, True]


def test_of_a_sure_network_all_the_other_classes_count_together() -> None:
    probabilities = np.array([[1, 1e-10, 3e-10], [1, 3e-10, 2e-10]], dtype=np.float32)

    first, second = answers_of(np.array([0, 0]), probabilities).log_odds(0)

    assert first - second == pytest.approx(np.log(5 / 4), rel=1e-3)
    assert np.isfinite(answers_of(np.array([0]), np.array([[1.0, 0.0]])).log_odds(1)).all()


def test_with_three_classes_every_one_has_figures_against_the_others() -> None:
    random = np.random.default_rng(0)
    labels, likely = np.arange(60) % 3, random.dirichlet(np.ones(3), 60)
    said = likely.argmax(1)

    for k, found in enumerate(class_metrics(labels, likely, classes="abc")):
        odds = np.log(likely[:, k]) - np.log(1 - likely[:, k])
        assert found.auroc == pytest.approx(sklearn.roc_auc_score(labels == k, odds))
        assert found.sensitivity == pytest.approx((said == k)[labels == k].mean())
        assert found.specificity == pytest.approx((said != k)[labels != k].mean())
        named = metrics(labels, likely, positive=k)
        assert (named.auroc, named.sensitivity) == (found.auroc, found.sensitivity)


def test_one_class_alone_has_no_area_whichever_it_is() -> None:
    for label in (0, 1):
        assert metrics(np.full(2, label), BINARY[:2]).auroc is None


def test_a_finding_is_seen_above_one_half_and_not_at_it() -> None:
    answers = answers_of(np.array([[1, 0]]), np.array([[0.5, 0.5]]))

    assert answers.predicted.tolist() == [[False, False]]
    assert answers.lead == pytest.approx([0.0])


def test_the_lead_of_findings_is_that_of_the_worst_one() -> None:
    answers = answers_of(np.array([[1, 0], [1, 0]]), np.array([[0.9, 0.4], [0.3, 0.1]]))

    assert answers.lead == pytest.approx([0.2, -0.4])
