"""Intervals over patients: against scikit-learn, and against what statistics promises."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medspark.evaluate.bootstrap import intervals, weighted_auroc
from medspark.evaluate.metrics import class_metrics, metrics


def sample(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    ill = np.clip(0.5 + 0.15 * (2 * labels - 1) + 0.2 * random.standard_normal(count), 0, 1)
    return labels, np.stack([1 - ill, ill], axis=1)


def test_weighted_areas_are_those_of_scikit_learn() -> None:
    labels, probabilities = sample(60)
    score = probabilities[:, 1].round(1)  # with ties
    weights = np.random.default_rng(1).integers(0, 4, (5, 60)).astype(np.float32)

    found = weighted_auroc(labels == 1, score, weights)

    expected = [roc_auc_score(labels, score, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_intervals_hold_the_figures_themselves() -> None:
    labels, probabilities = sample(300)

    found = intervals(labels, probabilities, np.arange(300), samples=300)

    for name, value in metrics(labels, probabilities).model_dump().items():
        low, high = found[name]
        assert low < value < high
        assert high - low < 0.2


def test_the_interval_of_a_share_is_as_wide_as_theory_says() -> None:
    labels, probabilities = sample(400)
    share = metrics(labels, probabilities).accuracy

    low, high = intervals(labels, probabilities, np.arange(400), samples=2000)["accuracy"]

    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.1)


def test_images_of_one_patient_count_as_one_witness() -> None:
    labels, probabilities = sample(50)
    copies = np.tile(labels, 8), np.tile(probabilities, (8, 1))

    alone = intervals(labels, probabilities, np.arange(50), samples=500)["accuracy"]
    repeated = intervals(*copies, np.tile(np.arange(50), 8), samples=500)["accuracy"]

    np.testing.assert_allclose(repeated, alone, atol=1e-6)


def test_several_classes_and_seeds() -> None:
    random = np.random.default_rng(0)
    labels, probabilities = np.arange(90) % 3, random.dirichlet(np.ones(3), 90)

    found = intervals(labels, probabilities, np.arange(90), samples=100, seed=1)

    assert set(found) == set(metrics(labels, probabilities).model_dump())
    assert found == intervals(labels, probabilities, np.arange(90), samples=100, seed=1)
    assert found != intervals(labels, probabilities, np.arange(90), samples=100, seed=2)


def test_a_figure_without_meaning_has_no_interval() -> None:
    labels, probabilities = np.zeros(20, dtype=int), sample(20)[1]

    found = intervals(labels, probabilities, np.arange(20), samples=50)

    assert "accuracy" in found
    assert "auroc" not in found
    assert "sensitivity" not in found


def test_every_class_and_the_attacks_success_have_intervals_that_hold_their_figures() -> None:
    labels, clean = sample(300)
    right = clean.argmax(1) == labels
    fooled = right & (np.arange(300) % 3 == 0)
    attacked = np.where(fooled[:, None], clean[:, ::-1], clean)

    found = intervals(labels, attacked, np.arange(300), samples=200, clean=clean, per_class=True)

    values = {"success_rate": (attacked.argmax(1) != labels)[right].mean()}
    for k, figures in enumerate(class_metrics(labels, attacked, classes=("well", "ill"))):
        told = figures.model_dump(exclude={"name", "intervals"})
        values |= {f"{name}/{k}": value for name, value in told.items()}
    assert set(values) < set(found)
    for name, value in values.items():
        low, high = found[name]
        assert low < value < high
    assert found["sensitivity/1"] == found["sensitivity"]


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_a_level_is_the_share_of_resamples_that_an_interval_holds(level: float) -> None:
    labels, probabilities = sample(300)
    narrow, wide = (
        intervals(labels, probabilities, np.arange(300), samples=1000, level=at)["accuracy"]
        for at in (level, 0.95)
    )
    share = metrics(labels, probabilities).accuracy
    spread = np.sqrt(share * (1 - share) / 300)

    assert wide == intervals(labels, probabilities, np.arange(300), samples=1000)["accuracy"]
    width = 2 * spread * {0.5: 0.674, 0.9: 1.645}[level]
    assert narrow[1] - narrow[0] == pytest.approx(width, rel=0.15)


def test_a_figure_that_most_resamples_leave_undefined_has_no_interval() -> None:
    labels = np.zeros(20, dtype=int)
    labels[0] = 1  # drawn by 64 % of resamples; of two groups in one, by hardly any
    _, probabilities = sample(20)

    found = intervals(labels, probabilities, np.arange(20), samples=400)
    assert "sensitivity" in found
    alone = intervals(np.array([1, 0]), probabilities[:2], np.array([0, 1]), samples=400)
    assert "auroc" not in alone  # half of the resamples hold both, and half do not
