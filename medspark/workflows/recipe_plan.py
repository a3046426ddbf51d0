"""Plan the table of recipes: which cells each stage has, as pure functions of the records.

Recipes get equal training time. On every set all recipes are timed for a few steps, one after the
other (calibration). The budget is what the default's steps would take for its epochs at that speed.
Every recipe trains for as many steps as fit the budget, with all schedules planned for that number.
All speeds come from calibrations, because a machine can be slower hours later.

Four stages:

1. all recipes timed
2. all recipes with the first seed, screened on validation images
3. the default and the finalists with the other seeds, screened on validation images
4. the default and the finalists with all seeds, on test images

The same records give the same cells, so that the same command resumes a study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medspark.shards.plan import EpochPlan
from medspark.study.recipe_report import DEFAULT, RecipeCell, Standing
from medspark.workflows.recipe_choice import finalists, standings
from medspark.workflows.recipe_config import RecipeTableConfig, recipe_names

__all__ = [
    "budget_of", "chosen_finalists", "epochs_of", "final_cells", "final_standings",
    "planned_steps", "repeated_cells", "screened_cells", "screened_standings", "timed_cells",
]  # fmt: skip


def planned_steps(budget: float, seconds_per_step: float) -> int:
    """Return how many steps fit ``budget`` seconds, at least one."""
    return max(1, round(budget / seconds_per_step))


def epochs_of(steps: int, *, rows: int, batch: int) -> float:
    """Return how many passes over ``rows`` images ``steps`` steps of ``batch`` images are."""
    return steps / EpochPlan(rows, batch, seed=0).steps


def timed_cells(config: RecipeTableConfig) -> list[RecipeCell]:
    """Return the calibrations of all recipes on all sets."""
    return [
        RecipeCell(
            stage="calibration",
            recipe=recipe,
            dataset=name,
            seed=config.seeds[0],
            steps=config.calibration_steps,
        )
        for name in config.shards
        for recipe in recipe_names(config)
    ]


def budget_of(
    config: RecipeTableConfig, records: Iterable[RecipeCell], dataset: str
) -> float | None:
    """Return the seconds of training on ``dataset``; None if the default was not timed."""
    if config.seconds is not None:
        return config.seconds
    for cell in records:
        if (cell.stage, cell.recipe, cell.dataset) != ("calibration", DEFAULT, dataset):
            continue
        if cell.seconds_per_step and cell.trained_steps and cell.epochs:
            epoch = cell.seconds_per_step * cell.trained_steps / cell.epochs
            return config.train.epochs * epoch
    return None


def screened_cells(config: RecipeTableConfig, records: Sequence[RecipeCell]) -> list[RecipeCell]:
    """Return the screening of every recipe that was timed, for as many steps as fit the budget."""
    found = []
    for cell in records:
        budget = budget_of(config, records, cell.dataset)
        if cell.stage == "calibration" and cell.seconds_per_step and budget is not None:
            steps = planned_steps(budget, cell.seconds_per_step)
            planned = {"stage": "screening", "steps": steps, "budget": budget}
            found.append(_blank(cell, **planned))
    return found


def screened_standings(config: RecipeTableConfig, records: Iterable[RecipeCell]) -> list[Standing]:
    """Return how all recipes did with the first seed, the best first."""
    return _standings(config, records, recipe_names(config), config.seeds[:1])


def chosen_finalists(config: RecipeTableConfig, records: Iterable[RecipeCell]) -> tuple[str, ...]:
    """Return the finalists besides the default, by the first seed's validation figures."""
    return finalists(screened_standings(config, records), config.finalists)


def repeated_cells(config: RecipeTableConfig, records: Sequence[RecipeCell]) -> list[RecipeCell]:
    """Return the screening of the default and the finalists with the other seeds."""
    return [
        _blank(cell, seed=seed, steps=cell.steps, budget=cell.budget)
        for cell in _of_finalists(config, records)
        if cell.seed == config.seeds[0]
        for seed in config.seeds[1:]
    ]


def final_cells(config: RecipeTableConfig, records: Sequence[RecipeCell]) -> list[RecipeCell]:
    """Return the test of the default and the finalists with every seed that was screened."""
    return [
        _blank(cell, stage="test", steps=cell.steps, budget=cell.budget)
        for cell in _of_finalists(config, records)
    ]


def final_standings(config: RecipeTableConfig, records: Sequence[RecipeCell]) -> list[Standing]:
    """Return how the default and the finalists did with all seeds, on validation images alone."""
    recipes = (DEFAULT, *chosen_finalists(config, records))
    return _standings(config, records, recipes, config.seeds)


def _standings(
    config: RecipeTableConfig,
    records: Iterable[RecipeCell],
    recipes: Sequence[str],
    seeds: Sequence[int],
) -> list[Standing]:
    return standings(
        records,
        recipes=recipes,
        sets=tuple(config.shards),
        seeds=seeds,
        eps=config.attack.eps,
        metric=config.criterion,
        margin=config.margin,
    )


def _of_finalists(config: RecipeTableConfig, records: Sequence[RecipeCell]) -> list[RecipeCell]:
    """Return the finished screening cells of the default and the finalists."""
    chosen = (DEFAULT, *chosen_finalists(config, records))
    return [
        cell
        for recipe in chosen
        for cell in records
        if cell.stage == "screening" and cell.finished and cell.recipe == recipe
    ]


def _blank(cell: RecipeCell, **changed: object) -> RecipeCell:
    """Return a cell of the same recipe, set and seed before it runs, with ``changed`` fields."""
    named = {
        "stage": cell.stage,
        "recipe": cell.recipe,
        "dataset": cell.dataset,
        "seed": cell.seed,
    }
    return RecipeCell.model_validate(named | changed)
