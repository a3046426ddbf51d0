"""Recipes as settings: from YAML and the command line, and what makes a network another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_records import table

from medspark.config import load_config
from medspark.errors import UsageError
from medspark.study.recipe_report import DEFAULT
from medspark.workflows.recipe_config import (
    RecipeTableConfig,
    changes,
    fingerprint,
    recipe_names,
    training_of,
)

CONF = Path(__file__).parents[2] / "conf" / "jobs" / "recipe_table.yaml"


def test_the_command_line_adds_recipes_and_changes_those_of_the_file() -> None:
    argv = ["--config", str(CONF), "--shards.x", "x", "--recipes.pgd.train.inner_steps", "3",
            "--recipes.flip.data.augment.flip", "0"]  # fmt: skip

    config = load_config(RecipeTableConfig, argv)

    assert recipe_names(config)[0] == DEFAULT
    assert {"pgd", "flip", "layer_decay"} < set(recipe_names(config))
    assert changes(config, "pgd") == {"train.mode": "pgd", "train.inner_steps": "3"}
    pgd = training_of(config, "pgd", seed=0, steps=9)
    assert (pgd.train.mode, pgd.train.inner_steps, pgd.steps) == ("pgd", 3, 9)
    assert training_of(config, "flip", seed=0, steps=9).data.augment.flip == 0


def test_a_recipe_changes_only_what_it_names() -> None:
    config = table(train={"epochs": 3, "monitor": {"gap": 0.5}},
                   recipes={"a": {"train": {"monitor": {"steps": 4}}}})  # fmt: skip

    default, other = (training_of(config, name, seed=7, steps=None) for name in (DEFAULT, "a"))

    assert other.train.monitor.steps == 4
    assert other.train.model_dump() | {"monitor": None} == default.train.model_dump() | {
        "monitor": None
    }
    assert (other.train.monitor.gap, other.seed) == (0.5, 7)
    assert "lr" not in other.train.model_fields_set  # a kind of network may have its own


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"train": {"emma": 0.9}}, r"recipes\.a\.train\.emma: "),
        ({"train": {"ema": 2}}, r"recipes\.a\.train\.ema: "),
        ({"attack": {"eps": 0.1}}, r"recipes\.a\.attack\.eps: a recipe changes train\.KEY or"),
        ({"train": {"epochs": 3}}, r"recipes\.a\.train\.epochs: recipes get equal time"),
        ({"train": 3}, r"recipes\.a\.train: a recipe changes train\.KEY or"),
        (0.9, r"recipes\.a: a recipe changes train\.KEY or"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_path(recipe: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        training_of(table(recipes={"a": recipe}), "a", seed=0, steps=1)


def test_a_network_depends_on_recipe_seed_steps_data_and_processes_and_on_no_name() -> None:
    config = table(launch={"processes": 1})
    same = table(launch={"processes": 1}, recipes={"other": {"train": {"weight_decay": 1}}},
                 folder="elsewhere", finalists=9, evaluate={"steps": 3})  # fmt: skip
    ranks = table(launch={"processes": 2})

    def of(
        config: RecipeTableConfig, recipe: str = "a", seed: int = 0, steps: int = 5, data: str = "d"
    ) -> str:
        training = training_of(config, recipe, seed=seed, steps=steps)
        return fingerprint(config, training, dataset=data)

    assert of(config) == of(same, "other")
    others = [of(config), of(config, "b"), of(config, seed=1), of(config, steps=6),
              of(config, data="e"), of(ranks)]  # fmt: skip
    assert len(set(others)) == len(others)


def test_epochs_decide_nothing_where_steps_are_planned() -> None:
    few, many = (table(train={"epochs": epochs}) for epochs in (2, 9))

    planned = [
        fingerprint(each, training_of(each, "a", seed=0, steps=5), dataset="d")
        for each in (few, many)
    ]
    whole = [
        fingerprint(each, training_of(each, DEFAULT, seed=0, steps=None), dataset="d")
        for each in (few, many)
    ]

    assert planned[0] == planned[1]
    assert whole[0] != whole[1]
