"""Images with several findings: figures as scikit-learn's, and one finding as two classes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sklearn
from torch import Tensor, nn

from medspark.attacks.config import OF_DENOISED, AttackName
from medspark.attacks.losses import correct, margin, probabilities
from medspark.evaluate.answers import answers_of
from medspark.evaluate.bootstrap import intervals
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.metrics import class_metrics, metrics
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import Batch, attack_all, evaluate
from medspark.evaluate.sanity import SanityConfig
from medspark.evaluate.summary import Arrays, Predictions, predictions, summarise

OTHERS = ("transfer", *OF_DENOISED)
WHITE_BOX = tuple(name for name in get_args(AttackName) if name not in OTHERS)
LOGITS = st.floats(-30, 30, width=32).filter(lambda z: abs(z) > 1e-3)

CONFIG = AttackSettings(
    attacks=("fgsm", "pgd", "pgd_margin", "autoattack"), eps=(0, 0.1, 0.2), steps=5,
    queries=50, sanity_images=30,
)  # fmt: skip


class Groups(nn.Module):
    """A network of classes as one of findings: whether the class is in each of some groups."""

    def __init__(self, network: nn.Module, members: Tensor) -> None:
        super().__init__()
        self.network, self.members = network, members

    def forward(self, images: Tensor) -> Tensor:
        likely = self.network(images)[:, None]
        inside = likely.masked_fill(self.members == 0, -torch.inf).logsumexp(2)
        return inside - likely.masked_fill(self.members == 1, -torch.inf).logsumexp(2)


class Pair(nn.Module):
    """A network of one finding as one of two classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logit = self.network(images)
        return torch.cat([-logit / 2, logit / 2], dim=1)


# Which of the ten digits are odd, are large, have a closed loop.
MEMBERS = torch.tensor([[d % 2, int(d > 4), int(d in (0, 4, 6, 8, 9))] for d in range(10)]).T


@pytest.fixture(scope="module")
def findings(robust_network) -> nn.Module:
    return Groups(robust_network, MEMBERS)


@pytest.fixture(scope="module")
def test_set(digits) -> Batch:
    labels = MEMBERS.T[digits.test_labels[:60]].float()
    return digits.test_images[:60], labels, torch.arange(60)


@pytest.fixture(scope="module")
def attacked(findings, test_set: Batch) -> Arrays:
    return attack_all(findings, [test_set], CONFIG)


@pytest.fixture(scope="module")
def report(attacked: Arrays) -> RobustnessResult:
    return summarise(attacked, CONFIG.trials(), limits=SanityConfig())


@pytest.fixture(scope="module")
def predicted(attacked: Arrays) -> Predictions:
    return predictions(attacked, CONFIG.trials())


@given(st.integers(1, 5).flatmap(lambda k: arrays("f4", (4, k), elements=LOGITS)), st.randoms())
def test_an_image_is_fooled_where_any_finding_is_wrong_and_all_forms_agree(logits, random):
    labels = np.array([[random.randint(0, 1) for _ in row] for row in logits], dtype="f4")
    by_hand = ((logits > 0) == (labels == 1)).all(1)

    on_torch = torch.from_numpy(logits), torch.from_numpy(labels)
    said = answers_of(labels, probabilities(*on_torch).numpy())

    assert (correct(*on_torch).numpy() == by_hand).all()
    assert ((margin(*on_torch) < 0).numpy() == by_hand).all()
    assert (said.right == by_hand).all()
    assert ((said.lead > 0) == by_hand).all()


def sample(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = (random.random((count, 3)) < (0.1, 0.4, 0.7)).astype("f4")
    noise = random.standard_normal(labels.shape)
    return labels, 1 / (1 + np.exp(-(2 * labels - 1 + noise)))


def test_figures_are_those_of_scikit_learn() -> None:
    labels, likely = sample()
    said = likely > 0.5
    found = metrics(labels, likely)

    recalls = sklearn.recall_score(labels, said, average=None)
    spared = sklearn.recall_score(1 - labels, ~said, average=None)
    assert found.model_dump() == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, said),
            "label_accuracy": 1 - sklearn.hamming_loss(labels, said),
            "auroc": sklearn.roc_auc_score(labels, likely, average="macro"),
            "balanced_accuracy": np.mean(
                [sklearn.balanced_accuracy_score(labels[:, k], said[:, k]) for k in range(3)]
            ),
            "sensitivity": recalls.mean(),
            "specificity": spared.mean(),
        }
    )
    areas = sklearn.roc_auc_score(labels, likely, average=None)
    for k, each in enumerate(class_metrics(labels, likely, classes="abc")):
        assert (each.name, each.auroc) == ("abc"[k], pytest.approx(areas[k]))
        assert (each.sensitivity, each.specificity) == pytest.approx((recalls[k], spared[k]))
    assert metrics(labels, likely, positive=1).auroc == pytest.approx(areas[1])


def test_intervals_hold_the_figures_themselves() -> None:
    labels, likely = sample()

    found = intervals(labels, likely, np.arange(200), samples=200, per_class=True, clean=likely)

    assert found["success_rate"] == (0, 0)
    for name, value in metrics(labels, likely).model_dump().items():
        low, high = found[name]
        assert low < value < high
    for k, each in enumerate(class_metrics(labels, likely, classes="abc")):
        low, high = found[f"auroc/{k}"]
        assert low < each.auroc < high


def test_resamples_of_a_single_group_are_the_figures_themselves() -> None:
    labels, likely = sample()

    found = intervals(labels, likely, np.zeros(200), samples=2)

    for name, value in metrics(labels, likely).model_dump().items():
        assert found[name] == pytest.approx((value, value))


def test_an_image_is_as_sure_as_its_least_sure_decision_and_decisions_are_all_of_them() -> None:
    answers = answers_of(np.array([[1, 0, 1]]), np.array([[1.0, 0.1, 0.4]]))

    sure, right = answers.decisions
    assert answers.confidence == pytest.approx([0.6])
    assert sure == pytest.approx([1, 0.9, 0.6])
    assert right.tolist() == [True, True, False]


def test_a_finding_that_no_image_has_is_left_out_of_the_means() -> None:
    labels, likely = sample()
    without = labels.copy()
    without[:, 0] = 0

    found = metrics(without, likely)

    assert found.auroc == pytest.approx(metrics(labels[:, 1:], likely[:, 1:]).auroc)
    assert class_metrics(without, likely, classes="abc")[0].auroc is None


@pytest.mark.parametrize("name", WHITE_BOX)
def test_one_finding_is_attacked_and_judged_as_two_classes_are(
    name, robust_network, digits
) -> None:
    odd = Groups(robust_network, MEMBERS[:1])
    images, numbers, rows = digits.test_images[:40], digits.test_labels[:40] % 2, torch.arange(40)
    config = AttackSettings(attacks=(name,), eps=(0.0, 0.15), steps=4, queries=30, sanity_images=20)

    one = attack_all(odd, [(images, numbers[:, None].float(), rows)], config)
    two = attack_all(Pair(odd), [(images, numbers, rows)], config)

    for key, likely in predictions(two, config.trials()).probabilities.items():
        # Two ways to compute the same value round differently: an image at a boundary may differ.
        apart = np.abs(predictions(one, config.trials()).probabilities[key][:, 0] - likely[:, 1])
        assert (apart > 1e-3).mean() <= 0.05
    left, right = (
        figures(summarise(found, config.trials(), limits=SanityConfig(), positive=positive))
        for found, positive in ((one, 0), (two, 1))
    )
    assert left == pytest.approx(right, rel=0.05, abs=0.06)


def figures(report: RobustnessResult) -> dict[str, float]:
    found = {f"clean/{k}": v for k, v in report.clean.metrics.items()}
    for result in report.under_attack:
        told = result.as_json()
        names = ("accuracy", "auroc", "balanced_accuracy", "sensitivity", "specificity",
                 "success_rate", "linf_255")  # fmt: skip
        found |= {f"{result.name}/{result.eps}/{k}": told[k] for k in names if k in told}
    found |= {flag.name: flag.value for flag in report.flags}
    return {name: value for name, value in found.items() if name != "clean/label_accuracy"}


def test_the_worst_case_of_an_image_is_at_most_each_attacks(
    report: RobustnessResult, predicted: Predictions
) -> None:
    for eps in ("25.5", "51"):
        worst = answers_of(predicted.labels, predicted.probabilities[f"worst_case@{eps}"])
        for name in ("fgsm", "pgd", "pgd_margin", "autoattack"):
            attacked = answers_of(predicted.labels, predicted.probabilities[f"{name}@{eps}"])
            assert (worst.lead <= attacked.lead).all()
            assert not (worst.right & ~attacked.right).any()
    assert report.worst_case[-1].accuracy < report.clean.accuracy
    assert report.believable


def test_success_is_of_images_that_were_right_in_every_finding(
    report: RobustnessResult, predicted: Predictions
) -> None:
    likely = predicted.probabilities
    before = answers_of(predicted.labels, likely["clean"]).right
    for result in report.attacks:
        key = f"{result.name}@{result.eps * 255:g}"
        after = answers_of(predicted.labels, likely[key]).right
        assert result.success_rate == pytest.approx((before & ~after).sum() / before.sum())
        assert result.label_accuracy >= result.accuracy == after.mean()


def test_an_eps_of_nothing_is_clean_exactly(predicted: Predictions) -> None:
    for name in ("fgsm", "pgd", "autoattack"):
        np.testing.assert_array_equal(
            predicted.probabilities[f"{name}@0"], predicted.probabilities["clean"]
        )


def test_a_saturated_network_is_flagged_and_still_ranked(findings, test_set: Batch) -> None:
    class Hot(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 50 * findings(images)

    found = evaluate(Hot(), [test_set], AttackSettings(attacks=("fgsm",), eps=(0.1,)))
    cool = evaluate(findings, [test_set], AttackSettings(attacks=("fgsm",), eps=(0.1,)))

    assert "confidence_saturated" in {flag.name for flag in found.flags if flag.triggered}
    assert not cool.flags[0].triggered
    assert found.clean.accuracy == cool.clean.accuracy


@pytest.mark.parametrize("said", [(0, 0, 0), (1, 0, 0)])
def test_a_network_that_says_the_same_of_everybody_is_flagged(said, test_set: Batch) -> None:
    images, labels, rows = test_set
    labels = labels.clone()
    labels[:, 0] = said[0]  # so that it is right in part

    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] - 5 + 10 * torch.tensor(said)

    config = AttackSettings(attacks=("fgsm",), eps=(0.1,))
    found = evaluate(Blind(), [(images, labels, rows)], config)

    assert "same_class_for_all" in {flag.name for flag in found.flags if flag.triggered}
