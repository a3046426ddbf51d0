"""The settings of a decision: one goal, two classes, images of both to choose it on."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from medspark.errors import UsageError
from medspark.evaluate.config import DecisionConfig
from medspark.shards.manifest import Manifest, Split


def manifest_of(classes: tuple[str, ...], counts: tuple[int, ...], *, multi_label: bool = False):
    split = Split(rows=sum(counts), patients=1, class_counts=counts, shards=())
    return Manifest(
        digest="d", generation="g", classes=classes, multi_label=multi_label, height=16, width=16,
        channels=1, bits=8, seed=0, splits={"val": split}, leak_check={}, source={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "criterion", "target"),
    [
        ({}, None, None),
        ({"sensitivity": 0.95}, "sensitivity", 0.95),
        ({"specificity": 0.9, "under": "pgd"}, "specificity", 0.9),
        ({"youden": True, "positive": "a"}, "youden", None),
    ],
)
def test_a_goal_is_read(given, criterion, target) -> None:
    config = DecisionConfig.model_validate(given)

    assert (config.criterion, config.target) == (criterion, target)


@pytest.mark.parametrize(
    "given",
    [{"sensitivity": 0.9, "youden": True}, {"under": "pgd"}, {"positive": "a"},
     {"sensitivity": 0}, {"specificity": 1.1}],
)  # fmt: skip
def test_two_goals_or_none_for_a_setting_are_refused(given) -> None:
    with pytest.raises(ValidationError):
        DecisionConfig.model_validate(given)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (manifest_of(("a", "b", "c"), (3, 3, 3)), "needs two classes, and there are 3 classes"),
        (manifest_of(("a", "b"), (3, 3), multi_label=True), "and there are 2 findings"),
        (manifest_of(("a", "b"), (3, 0)), "have none of at least one"),
        (manifest_of(("x", "y"), (3, 3)), "there is no class 'a'; there are x, y"),
    ],
)
def test_shards_on_which_nothing_can_be_chosen_are_refused_in_a_sentence(manifest, said) -> None:
    with pytest.raises(UsageError, match=said):
        DecisionConfig(youden=True, positive="a").check(manifest)


def test_without_a_goal_any_shards_will_do() -> None:
    DecisionConfig().check(manifest_of(("a", "b", "c"), (3, 0, 0)))


def test_the_positive_class_is_the_last_of_two_by_default() -> None:
    assert DecisionConfig().positive_of(("a", "b"), multi_label=False) == 1
    assert DecisionConfig(youden=True, positive="a").positive_of("ab", multi_label=False) == 0
