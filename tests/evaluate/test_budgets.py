"""Several budgets together: the same worst cases in half the passes, and flags that contradict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medspark.eps import eps_text
from medspark.evaluate.answers import answers_of
from medspark.evaluate.budgets import downwards, once
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.report import carried_facts
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.robust import Batch, attack_all, evaluate
from medspark.evaluate.sanity import CONTROL_EVERY
from medspark.evaluate.summary import Arrays, worst_cases

SEEN: Counter[str] = Counter()
BUDGETS = {"plain_network": (0.02, 0.05, 0.1), "robust_network": (0.05, 0.1, 0.2)}


class Counting(nn.Module):
    """A network that counts the images which it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        SEEN["images"] += len(images)
        return self.network(images)


def counted(
    network: nn.Module, batch: Batch, eps: Sequence[float], *attacks: str
) -> tuple[Arrays, int]:
    """Return the arrays of the attacks at the budgets, and how many images the network saw."""
    settings = {
        "attacks": attacks, "eps": tuple(eps), "steps": 8, "queries": 150, "sanity_images": 0
    }  # fmt: skip
    SEEN.clear()
    arrays = attack_all(Counting(network), [batch], AttackSettings.model_validate(settings))
    return arrays, SEEN["images"]


@pytest.fixture(scope="module")
def test_set(digits) -> Batch:
    return digits.test_images[:150], digits.test_labels[:150], torch.arange(150)


def fooled(arrays: Arrays, probabilities: np.ndarray) -> set[int]:
    wrong = ~answers_of(arrays["labels"], probabilities).right
    return set(arrays["rows"][wrong].tolist())


@pytest.mark.parametrize("name", BUDGETS)
def test_three_budgets_together_have_the_worst_cases_of_each_alone_for_half_the_passes(
    request: pytest.FixtureRequest, test_set: Batch, name: str
) -> None:
    network, eps = request.getfixturevalue(name), BUDGETS[name]
    alone = [counted(network, test_set, [each], "autoattack") for each in eps]

    together, images = counted(network, test_set, eps, "autoattack")

    settings = AttackSettings(attacks=("autoattack",), eps=eps, steps=8, queries=150)
    worst = worst_cases(together, settings.trials())
    expected: set[int] = set()
    for (arrays, _), (trial, probabilities) in zip(alone, worst, strict=True):
        expected |= fooled(arrays, arrays[trial.key.replace("worst_case", "autoattack")])
        # Other batches round differently, which may change an image at the boundary.
        assert len(fooled(together, probabilities) ^ expected) <= 1
    assert images <= 0.5 * sum(count for _, count in alone)


def test_an_attack_for_the_nearest_image_runs_once_for_all_budgets(
    robust_network, test_set: Batch
) -> None:
    eps = BUDGETS["robust_network"]
    alone = [counted(robust_network, test_set, [each], "fab") for each in eps]

    together, images = counted(robust_network, test_set, eps, "fab")

    for arrays, _ in alone:
        (key,) = (name for name in arrays if name.startswith("fab@") and "/" not in name)
        np.testing.assert_allclose(together[key], arrays[key], atol=1e-5)
    assert images < 0.4 * sum(count for _, count in alone)


def test_what_held_is_not_attacked_again_and_its_perturbation_is_made_smaller() -> None:
    asked: list[tuple[float, list[int]]] = []
    clean = torch.full((4, 1, 1, 1), 0.5)
    threats = {eps: AttackSettings().threat(eps) for eps in (0.05, 0.1, 0.2)}

    def run(threat, chosen: Tensor) -> Tensor:
        asked.append((threat.eps, chosen.nonzero().flatten().tolist()))
        return clean[chosen] + threat.eps

    found = downwards(
        run, clean, threats,
        fools=lambda images: (images - clean).flatten() > torch.tensor([0.15, 0.07, 1, 1]),
        control=torch.tensor([False, False, False, True]),
    )  # fmt: skip

    assert asked == [(0.2, [0, 1, 2, 3]), (0.1, [0, 1, 3]), (0.05, [1, 3])]
    assert found[0.05].carried.tolist() == [True, False, True, False]
    for eps, each in found.items():
        torch.testing.assert_close(each.images, clean + eps)


def test_a_nearest_image_is_cut_to_each_budget() -> None:
    clean = torch.full((2, 1, 1, 1), 0.5)
    threats = {eps: AttackSettings().threat(eps) for eps in (0.1, 0.2)}

    found = once(lambda threat, chosen: clean[chosen] + 0.15, clean, threats)

    torch.testing.assert_close(found[0.1].images, clean + 0.1)
    torch.testing.assert_close(found[0.2].images, clean + 0.15)


class Bright(nn.Module):
    """Class 1 for bright images, with a gradient."""

    def forward(self, images: Tensor) -> Tensor:
        brightness = images.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat([-brightness, brightness], 1)


def contradicting(_model, images, labels, threat, _rng) -> Tensor:
    """Fool the network at a small budget, and leave the images as they are at a larger one."""
    if threat.eps > 0.1:
        return images
    return threat.project(images + torch.where(labels == 1, -1, 1).view(-1, 1, 1, 1), images)


def test_an_ensemble_that_does_more_harm_at_a_smaller_budget_is_flagged() -> None:
    count = 4 * CONTROL_EVERY
    labels = torch.arange(count) % 2
    images = (0.45 + 0.1 * labels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    config = AttackSettings(attacks=(), eps=(0.1, 0.2), sanity_images=0)

    result = evaluate(
        Bright(), [(images, labels, torch.arange(count))], config,
        own_attacks={"autoattack": contradicting},
    )  # fmt: skip

    (flag,) = (flag for flag in result.flags if flag.name == "autoattack_not_falling_with_eps")
    assert (flag.triggered, flag.value, flag.images) == (True, 1.0, 4)
    assert {row.eps: row.carried for row in result.attacks} == {0.1: count - 4, 0.2: 0}


def test_a_report_says_which_images_were_not_attacked_again(robust_network, test_set) -> None:
    config = AttackSettings(
        attacks=("autoattack",), eps=(0.1, 0.2), steps=2, queries=5, sanity_images=0
    )
    result = evaluate(robust_network, [test_set], config)

    row = next(row for row in result.attacks if row.eps == 0.1)
    (fact,) = carried_facts(result).values()
    assert row.carried
    assert fact.startswith(f"autoattack {eps_text(0.1)}: {row.carried} images.")


def test_a_result_of_an_earlier_version_carried_nothing() -> None:
    row = {"name": "autoattack", "steps": 5, "eps": 0.1, "accuracy": 0.5}
    before = RobustnessResult.model_validate({"images": 2, "clean": {}, "attacks": [row]})

    assert before.attacks[0].carried is None
    assert carried_facts(before) == {}
