"""Records of a table of recipes, for the tests of its plan and its choice."""

from __future__ import annotations

from typing import Any

from medspark.evaluate.result import CLEAN, WORST, Figure
from medspark.evaluate.sanity import Flag
from medspark.study.recipe_report import RecipeCell
from medspark.workflows.recipe_config import RecipeTableConfig

EPS = 2 / 255
FLAG = Flag(name="unsteady", triggered=True, value=1.0, threshold=0.1, sentence="answers change")


def table(**changes: Any) -> RecipeTableConfig:
    """Return the configuration of a table of three recipes beside the default, on one set."""
    recipes = {name: {"train": {"weight_decay": n}} for n, name in enumerate("abc", start=1)}
    usual = {"shards": {"cxr": "cxr"}, "recipes": recipes, "seeds": [0, 1]}
    return RecipeTableConfig.model_validate(usual | changes)


def screening(
    recipe: str, worst: float, clean: float = 0.9, *, dataset: str = "cxr", **changes: Any
) -> RecipeCell:
    """Return a finished screening, or with ``stage`` a finished test."""
    figures = (
        Figure(attack=CLEAN, eps=0, metric="auroc", value=clean),
        Figure(attack=WORST, eps=EPS, metric="auroc", value=worst),
        Figure(attack=WORST, eps=EPS, metric="balanced_accuracy", value=1 - worst),
    )
    told = {"stage": "screening", "seed": 0, "status": "finished", "train_seconds": 10.0}
    return RecipeCell.model_validate(
        {"recipe": recipe, "dataset": dataset, "figures": figures} | told | changes
    )
