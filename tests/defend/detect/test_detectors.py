"""Each detector computes its paper's equation, and is fitted on no image that it refers to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_features import CLASSES, drawn, training
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity as SklearnKernelDensity
from sklearn.svm import SVC

from medspark.defend.detect.bu import BayesianUncertainty
from medspark.defend.detect.combination import combine
from medspark.defend.detect.kde import KernelDensity
from medspark.defend.detect.lid import LocalDimension, local_dimension
from medspark.defend.detect.logistic import Logistic
from medspark.defend.detect.mahalanobis import Mahalanobis
from medspark.defend.detect.registry import DETECTORS, grid
from medspark.defend.detect.safetynet import SafetyNet
from medspark.errors import UsageError

TRAINING, SHOWN = training(), drawn(20, 7)


def test_kde_is_minus_the_log_density_of_the_predicted_class():
    detector = KernelDensity.fit("a", TRAINING)
    points, labels = detector.points.numpy(), detector.labels.numpy()

    scores = detector.score(SHOWN)

    for row, predicted in enumerate(SHOWN.predicted.tolist()):
        kernel = SklearnKernelDensity(bandwidth=detector.bandwidth)
        kernel.fit(points[labels == predicted].astype(float))
        expected = -kernel.score_samples(SHOWN.layers["a"][row : row + 1].double().numpy())
        assert scores[row] == pytest.approx(expected[0], rel=1e-4)


def test_kde_takes_a_bandwidth_that_explains_images_which_it_has_not_seen():
    detector = KernelDensity.fit("a", TRAINING)
    fresh = drawn(300, 11)

    def mean(bandwidth: float) -> float:
        other = KernelDensity("a", detector.points, detector.labels, bandwidth)
        return float(other.score(fresh).mean())

    assert mean(detector.bandwidth) < min(
        mean(detector.bandwidth / 8), mean(detector.bandwidth * 8)
    )


def test_lid_is_the_estimate_of_ma_et_al_among_all_neighbours():
    detector = LocalDimension.fit("a", TRAINING)
    points, k = detector.points.numpy(), detector.neighbours

    scores = detector.score(SHOWN)

    assert (len(points), k) == (100, 20)
    for row, value in enumerate(SHOWN.layers["a"].numpy()):
        r = np.sort(np.linalg.norm(points - value, axis=1))[:k]
        assert scores[row] == pytest.approx(-k / np.log(r / r[-1]).sum(), rel=1e-3)


def test_lid_of_points_in_a_ball_is_about_its_dimension():
    generator = torch.Generator().manual_seed(0)
    radius = torch.rand(200, 5000, generator=generator) ** (1 / 7)

    assert float(local_dimension(radius, 50).mean()) == pytest.approx(7, rel=0.05)


def test_lid_is_finite_where_distances_are_zero_or_all_equal():
    distance = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])

    assert local_dimension(distance, 3).isfinite().all()


def test_mahalanobis_is_the_distance_to_the_nearest_mean_under_one_covariance():
    detector = Mahalanobis.fit("a", TRAINING)
    points, labels = TRAINING.reference.layers["a"].double().numpy(), TRAINING.labels.numpy()
    means = np.stack([points[labels == k].mean(0) for k in range(CLASSES)])
    precision = (detector.factor @ detector.factor.T).double().numpy()

    scores = detector.score(SHOWN)

    spread = points - means[labels]
    shrunk, _ = ledoit_wolf(spread, assume_centered=True)
    assert precision == pytest.approx(np.linalg.inv(shrunk), abs=1e-4)
    for row, value in enumerate(SHOWN.layers["a"].double().numpy()):
        expected = min((value - m) @ precision @ (value - m) for m in means)
        assert scores[row] == pytest.approx(expected, rel=1e-3)


def test_mahalanobis_bears_more_features_than_images_and_constant_ones():
    few = training()
    wide = torch.cat([few.reference.layers["a"].repeat(1, 40), torch.ones(120, 1)], dim=1)
    few.reference.layers["a"] = wide  # type: ignore[index]

    detector = Mahalanobis.fit("a", few)

    assert detector.factor.shape == (201, 201)
    assert detector.factor.isfinite().all()


def test_bu_is_the_mean_variance_of_the_answers_over_dropout_masks():
    detector = BayesianUncertainty.fit("a", TRAINING)
    assert TRAINING.head is not None
    weight, bias = TRAINING.head
    dropout = torch.nn.Dropout(0.5).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = SHOWN.layers["a"]
        passes = torch.stack(
            [(dropout(values) @ weight.T + bias).softmax(1) for _ in range(20_000)]
        )
    many = BayesianUncertainty("a", weight, bias, seed=1, draws=20_000)

    assert torch.allclose(many.score(SHOWN), passes.var(0, correction=0).mean(1), atol=3e-3)
    again = replace(SHOWN, draw=1)
    assert torch.equal(detector.score(SHOWN), detector.score(SHOWN))
    assert not torch.equal(detector.score(SHOWN), detector.score(again))


def test_safetynet_is_the_machine_that_scikit_learn_fits_on_the_bits():
    detector = SafetyNet.fit("a", TRAINING)
    values, attacked = TRAINING.contrast("a")
    medians = TRAINING.reference.layers["a"].median(0).values
    machine = SVC(kernel="rbf", gamma="scale").fit((values > medians).numpy(), attacked.numpy())

    expected = machine.decision_function((SHOWN.layers["a"] > medians).numpy())

    assert detector.score(SHOWN).numpy() == pytest.approx(expected, abs=1e-4)


def test_the_surrogate_of_safetynet_orders_images_as_it_does_and_has_a_gradient():
    detector, shown = SafetyNet.fit("a", TRAINING), drawn(300, 5)
    values = shown.layers["a"].clone().requires_grad_(True)
    soft = detector.surrogate(type(shown)(shown.logits, {"a": values}))

    (gradient,) = torch.autograd.grad(soft.sum(), values)

    ranks = [v.argsort().argsort().double().numpy() for v in (soft.detach(), detector.score(shown))]
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert (gradient != 0).any(1).all()


def test_logistic_regression_is_scikit_learns_on_standardised_values():
    values, attacked = TRAINING.contrast("a")
    ours = Logistic.fit(values, attacked)
    standard = (values - values.mean(0)) / values.std(0, correction=0)
    theirs = LogisticRegression(max_iter=1000).fit(standard.numpy(), attacked.numpy())

    assert ours(values).numpy() == pytest.approx(
        theirs.decision_function(standard.numpy()), abs=1e-3
    )


# The contrastive detector looks at directions, not at distances: test_contrastive.py.
@pytest.mark.parametrize("name", sorted(DETECTORS.keys() - {"bu", "contrastive", "rank_pca"}))
def test_a_detector_tells_far_features_from_near_ones(name: str):
    detector = DETECTORS[name].fit("a", TRAINING)
    scores = torch.cat([detector.score(drawn(90, 21)), detector.score(drawn(90, 22, shift=2.0))])

    assert roc_auc_score([0] * 90 + [1] * 90, scores.numpy()) > 0.8


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_score_depends_on_no_other_image(name: str):
    detector = DETECTORS[name].fit("a", TRAINING)
    whole = detector.score(SHOWN)
    parts = [detector.score(SHOWN.of(torch.arange(i, i + 4))) for i in range(0, 20, 4)]

    assert torch.allclose(torch.cat(parts), whole, rtol=1e-5)


def test_the_combination_is_a_regression_on_the_scores_and_better_than_either():
    both = training(shift=1.0, layers=("a", "b"))
    parts = [Mahalanobis.fit(name, both) for name in ("a", "b")]
    combination = combine(parts, both)
    clean, attacked = (drawn(300, s, shift=s - 30, layers=("a", "b")) for s in (30, 31))

    def auroc(detector) -> float:
        scores = torch.cat([detector.score(clean), detector.score(attacked)]).numpy()
        return float(roc_auc_score([0] * 300 + [1] * 300, scores))

    assert auroc(combination) > max(map(auroc, parts))
    assert combination.layers == ("a", "b")
    scores = torch.stack([part.score(clean) for part in parts], dim=1)
    assert torch.equal(combination.score(clean), combination.regression(scores))


@pytest.mark.parametrize("name", ["kde", "mahalanobis"])
def test_a_class_without_reference_images_is_refused_in_one_sentence(name: str):
    lacking = training()
    lacking.labels[lacking.labels == 2] = 1

    with pytest.raises(
        UsageError, match=r"fit.reference_images: a class has 0 images .* give more\."
    ):
        DETECTORS[name].fit("a", lacking)


def test_the_grid_pairs_each_detector_with_the_layers_that_it_can_read():
    pairs = grid(["kde", "bu", "safetynet", "rank_pca"], ["stage", "penultimate", "logits"])

    assert ("kde", "logits") in pairs
    assert ("safetynet", "logits") not in pairs
    assert [layer for name, layer in pairs if name == "bu"] == ["penultimate"]
    assert [layer for name, layer in pairs if name == "rank_pca"] == ["uncentred", "centred"]
