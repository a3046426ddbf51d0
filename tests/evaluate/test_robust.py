"""Accuracy under attack: properties, slices per rank, and networks that must be flagged."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import Batch, attack_all, evaluate
from medspark.evaluate.summary import Predictions, each_once, predictions

CONFIG = AttackSettings(eps=(0.05, 0.1, 0.2), steps=10)


@pytest.fixture(scope="module")
def test_set(digits) -> Batch:
    return digits.test_images[:200], digits.test_labels[:200], torch.arange(200)


def cut(batch: Batch, size: int) -> list[Batch]:
    return list(zip(*(part.split(size) for part in batch), strict=True))


def predicted(network: nn.Module, batches: list[Batch], config: AttackSettings) -> Predictions:
    return predictions(each_once(attack_all(network, batches, config)), config.trials())


def accuracies(report: RobustnessResult, name: str) -> list[float]:
    return [attack.accuracy for attack in report.attacks if attack.name == name]


@pytest.fixture(scope="module")
def plain(plain_network, test_set: Batch) -> RobustnessResult:
    return evaluate(plain_network, [test_set], CONFIG)


@pytest.fixture(scope="module")
def robust(robust_network, test_set: Batch) -> RobustnessResult:
    return evaluate(robust_network, [test_set], CONFIG)


@pytest.fixture(scope="module")
def distilled(distilled_network, test_set: Batch) -> RobustnessResult:
    return evaluate(distilled_network, [test_set], CONFIG)


def test_accuracy_falls_with_eps(plain: RobustnessResult) -> None:
    for name in ("fgsm", "pgd"):
        falling = [plain.clean.accuracy, *accuracies(plain, name)]
        assert all(after <= before + 0.01 for before, after in itertools.pairwise(falling))


def test_fgsm_leaves_at_least_what_pgd_leaves(
    plain: RobustnessResult, robust: RobustnessResult
) -> None:
    for report in (plain, robust):
        for fgsm, pgd in zip(accuracies(report, "fgsm"), accuracies(report, "pgd"), strict=True):
            assert fgsm >= pgd - 0.01


def test_an_eps_of_nothing_is_clean_exactly(plain_network, test_set: Batch) -> None:
    config = AttackSettings(eps=(0.0,))
    report, likely = (judge(plain_network, [test_set], config) for judge in (evaluate, predicted))

    for name in ("fgsm@0", "pgd@0"):
        np.testing.assert_array_equal(likely.probabilities[name], likely.probabilities["clean"])
    assert all(attack.metrics == report.clean.metrics for attack in report.attacks)


@pytest.mark.parametrize("device", ["pretended", "cuda"], indirect=True)
def test_a_network_is_as_robust_on_any_device(plain_network, test_set: Batch, device) -> None:
    config = AttackSettings(eps=(0.0, 0.05, 0.1), steps=5, sanity_images=20)
    images, labels, rows = (part[:50] for part in test_set)
    expected = evaluate(plain_network, [(images, labels, rows)], config)

    batch = images.to(device), labels.to(device), rows
    network = copy.deepcopy(plain_network).to(device)
    found, likely = (judge(network, [batch], config) for judge in (evaluate, predicted))

    for name in config.attacks:
        assert accuracies(found, name) == pytest.approx(accuracies(expected, name), abs=0.021)
        np.testing.assert_array_equal(
            likely.probabilities[f"{name}@0"], likely.probabilities["clean"]
        )
    assert [flag.name for flag in found.flags if flag.triggered] == []


def test_training_on_attacks_helps(plain: RobustnessResult, robust: RobustnessResult) -> None:
    assert accuracies(plain, "pgd")[-1] < 0.1
    assert accuracies(robust, "pgd")[-1] > 0.35


def test_honest_networks_are_believed(plain: RobustnessResult, robust: RobustnessResult) -> None:
    for report in (plain, robust):
        assert [flag.name for flag in report.flags if flag.triggered] == []
        assert report.believable


def test_distillation_looks_robust_and_is_not_believed(distilled: RobustnessResult) -> None:
    triggered = {flag.name for flag in distilled.flags if flag.triggered}

    assert accuracies(distilled, "pgd")[-1] > 0.9
    assert not distilled.believable
    assert {
        "zero_gradients",
        "confidence_saturated",
        "fgsm_far_above_margin_pgd",
        "pgd_far_above_margin_pgd",
    } <= triggered


def assert_nearly_alike(found: RobustnessResult, expected: RobustnessResult) -> None:
    """Another batch size rounds differently, so an image at a boundary may differ."""
    for left, right in zip(found.attacks, expected.attacks, strict=True):
        assert (left.name, left.steps, left.eps) == (right.name, right.steps, right.eps)
        assert left.accuracy == pytest.approx(right.accuracy, abs=0.011)
        assert left.linf_255 == pytest.approx(right.linf_255, rel=0.01)
    for left, right in zip(found.figures(), expected.figures(), strict=True):
        assert (left.name, left.value) == (
            right.name,
            pytest.approx(right.value, abs=0.03, rel=0.01),
        )


@pytest.mark.parametrize("size", [7, 64])
def test_the_batch_size_does_not_matter(
    plain_network, test_set: Batch, plain: RobustnessResult, size: int
) -> None:
    batches = cut(test_set, size)
    found, whole = (predicted(plain_network, parts, CONFIG) for parts in (batches, [test_set]))

    for name, probabilities in found.probabilities.items():
        apart = np.abs(probabilities - whole.probabilities[name]).max(axis=1)
        assert (apart > 1e-3).mean() <= 0.02
    assert_nearly_alike(evaluate(plain_network, batches, CONFIG), plain)


def test_slices_of_two_ranks_make_the_same_report(
    plain_network, test_set: Batch, plain: RobustnessResult
) -> None:
    # The second rank repeats an image of the first to fill its share.
    halves = [[part[:100] for part in test_set], [part[99:] for part in test_set]]
    sent: list[list[np.ndarray]] = [[], []]
    for rank, half in enumerate(halves):
        evaluate(plain_network, [tuple(half)], CONFIG, gather=lambda a, r=rank: keep(sent[r], a))
    joined = (np.concatenate(pair) for pair in zip(*sent, strict=True))

    report = evaluate(plain_network, [tuple(halves[0])], CONFIG, gather=lambda _: next(joined))

    assert_nearly_alike(report, plain)
    assert report.images == 200


def keep(sent: list[np.ndarray], array: np.ndarray) -> np.ndarray:
    sent.append(array)
    return array


def test_more_restarts_never_leave_more(plain_network, test_set: Batch) -> None:
    images, labels, rows = (part[:60] for part in test_set)
    found = [
        accuracies(
            evaluate(
                plain_network,
                [(images, labels, rows)],
                AttackSettings(eps=(0.1,), steps=4, restarts=restarts, sanity_images=0),
            ),
            "pgd",
        )[0]
        for restarts in (1, 2, 5)
    ]

    assert all(after <= before + 0.02 for before, after in itertools.pairwise(found))


def test_the_report_has_the_form_that_jobs_promise(plain: RobustnessResult) -> None:
    document = plain.as_json()

    assert set(document["clean"]) == {
        "accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity",
    }  # fmt: skip
    order = [(row["name"], row["steps"], row["eps"]) for row in document["attacks"]]
    assert order == [
        (name, steps, eps)
        for (name, steps), eps in itertools.product([("fgsm", 1), ("pgd", 10)], [0.05, 0.1, 0.2])
    ]


class Wrapped(nn.Module):
    """A gradient-hiding wrapper around a network that is not robust."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Quantised(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 4).round() / 4)


class Noisy(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + 0.3 * torch.randn_like(images))


class Saturated(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return 200 * self.network(images)


class StuckInTrainMode(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network.train()(images)


@pytest.mark.parametrize(
    ("trick", "sign"),
    [
        (Quantised, "zero_gradients"),
        (Noisy, "answers_not_repeatable"),
        (Saturated, "confidence_saturated"),
        (StuckInTrainMode, "answers_not_repeatable"),
    ],
)
def test_tricks_are_seen_through(plain_network, test_set: Batch, trick, sign: str) -> None:
    report = evaluate(trick(plain_network), [test_set], CONFIG)

    assert sign in {flag.name for flag in report.flags if flag.triggered}
    assert not report.believable


def test_an_attack_that_returns_the_images_is_seen_through(plain_network, test_set: Batch) -> None:
    def lazy(_model, images, _labels, _threat, _rng):
        return images

    report = evaluate(plain_network, [test_set], CONFIG, own_attacks={"lazy": lazy})

    assert accuracies(report, "lazy") == [report.clean.accuracy] * 3
    assert [flag.name for flag in report.flags if flag.triggered] == ["noise_as_strong_as_lazy"]


def test_an_attack_that_cheats_is_seen_through(plain_network, test_set: Batch) -> None:
    def generous(_model, images, _labels, _threat, _rng):
        return 1 - images

    report = evaluate(plain_network, [test_set], CONFIG, own_attacks={"generous": generous})

    assert "attack_leaves_threat_model" in {flag.name for flag in report.flags if flag.triggered}


def test_the_worst_case_of_a_distilled_network_is_near_nothing(
    distilled_network, test_set: Batch
) -> None:
    config = AttackSettings(eps=(0.2,), attacks=("pgd", "pgd_margin"), sanity_images=0)

    report = evaluate(distilled_network, [test_set], config)

    assert report.attacks[0].accuracy > 0.9
    assert report.worst_case[0].accuracy < 0.05


def test_the_worst_case_is_no_better_than_any_attack_on_any_image(
    robust_network, test_set: Batch
) -> None:
    config = AttackSettings(eps=(0.1, 0.2), attacks=("fgsm", "pgd", "square"), queries=50)

    found = predicted(robust_network, [test_set], config)

    for eps in ("25.5", "51"):
        worst = found.probabilities[f"worst_case@{eps}"].argmax(1) == found.labels
        for name in config.attacks:
            attacked = found.probabilities[f"{name}@{eps}"].argmax(1) == found.labels
            assert (worst <= attacked).all()


def test_perturbations_are_measured(plain: RobustnessResult) -> None:
    for attack in plain.attacks:
        levels = 255 * attack.eps
        assert 0.9 * levels < attack.linf_255 <= levels + 1e-3
        assert 0 < attack.rms_255 <= attack.linf_255


class BlackBox(Wrapped):
    gradients = False

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.detach()).detach()


def test_a_model_without_gradients_takes_black_box_attacks_only(
    plain_network, robust_network, test_set: Batch
) -> None:
    batch = tuple(part[:60] for part in test_set)
    config = AttackSettings(eps=(0.2,), attacks=("square", "transfer"), queries=200)

    report = evaluate(BlackBox(plain_network), [batch], config, surrogates=[robust_network])

    assert accuracies(report, "square")[0] < 0.3
    with pytest.raises(UsageError, match="pgd cannot run on a model without gradients"):
        evaluate(BlackBox(plain_network), [batch], AttackSettings(attacks=("pgd", "square")))


def test_transfer_without_a_surrogate_is_misuse(plain_network, test_set: Batch) -> None:
    with pytest.raises(UsageError, match="transfer needs a surrogate"):
        evaluate(plain_network, [test_set], AttackSettings(attacks=("transfer",)))


def test_a_limited_number_of_images_is_always_the_same_and_all_are_all() -> None:
    few = AttackSettings(images=20)

    assert len(set(few.rows(200))) == 20
    assert (np.diff(few.rows(200)) > 0).all()
    assert list(few.rows(200)) == list(few.rows(200))
    assert list(few.rows(10)) == list(range(10)) == list(AttackSettings().rows(10))


class Steep(nn.Module):
    """A network that is always right, by a lead that falls in one direction only."""

    def forward(self, images: Tensor) -> Tensor:
        lead = 9 - (images * torch.linspace(-1, 1, images[0].numel()).view(images[0].shape)).sum(
            (1, 2, 3)
        )
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


def steep(judge: Callable[..., Any], **chosen: object) -> Any:
    images = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    config = AttackSettings.model_validate(
        {"attacks": ("fgsm", "pgd"), "eps": (0.02, 0.1), "steps": 5} | chosen
    )
    return judge(Steep(), [(images, torch.zeros(6, dtype=torch.long), torch.arange(6))], config)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sizes_are_in_grey_levels_whichever_way_pixels_move(norm: str) -> None:
    for attack in steep(evaluate, norm=norm).attacks:
        # By eps up or down for linf; for l2 that is the root mean square, and some move more.
        assert attack.rms_255 == pytest.approx(255 * attack.eps, rel=1e-3)
        assert attack.linf_255 == pytest.approx(255 * attack.eps, rel=1e-3) or norm == "l2"
        assert attack.linf_255 >= attack.rms_255 - 1e-3


def test_attacks_of_every_image_take_its_lead_also_where_they_do_not_succeed() -> None:
    likely = steep(predicted).probabilities

    for name in ("fgsm@25.5", "pgd@25.5"):
        assert (likely[name][:, 0] < likely["clean"][:, 0]).all()
    np.testing.assert_allclose(likely["fgsm@25.5"], likely["pgd@25.5"], rtol=1e-4)


def test_random_starts_depend_on_the_seed_and_on_the_row_of_an_image(
    plain_network, test_set: Batch
) -> None:
    def attacked(seed: int, rows: Tensor) -> np.ndarray:
        config = AttackSettings(attacks=("pgd",), eps=(0.1,), steps=1, seed=seed, sanity_images=0)
        images, labels = test_set[0][:10], test_set[1][:10]
        return predicted(plain_network, [(images, labels, rows)], config).probabilities["pgd@25.5"]

    first, again, seeded, moved = (
        attacked(0, torch.arange(10)), attacked(0, torch.arange(10)),
        attacked(1, torch.arange(10)), attacked(0, torch.arange(10) + 50),
    )  # fmt: skip

    assert np.array_equal(first, again)
    assert not np.array_equal(first, seeded)
    assert not np.array_equal(first, moved)


def test_which_images_are_attacked_depends_on_the_seed() -> None:
    first, other = (AttackSettings(images=20, seed=seed).rows(200).tolist() for seed in (0, 1))

    assert first != other
    assert AttackSettings(images=200).rows(200).tolist() == list(range(200))
    assert len(AttackSettings(images=199).rows(200)) == 199


def test_the_effort_is_what_was_configured() -> None:
    config = AttackSettings(steps=3, restarts=4, queries=5)

    assert (config.effort.steps, config.effort.restarts, config.effort.queries) == (3, 4, 5)
    assert [trial.steps for trial in AttackSettings(
        attacks=("fgsm", "pgd", "apgd", "fab", "square"), eps=(0.1,), steps=4, queries=9
    ).trials(["mine"])] == [1, 4, 20, 10, 9, 4]  # fmt: skip
