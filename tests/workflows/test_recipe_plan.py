"""The stages of a table of recipes: equal time, and cells that follow from the records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_records import screening, table

from medspark.study.recipe_report import DEFAULT, RecipeCell
from medspark.workflows.recipe_plan import (
    budget_of,
    chosen_finalists,
    epochs_of,
    final_cells,
    final_standings,
    planned_steps,
    repeated_cells,
    screened_cells,
    timed_cells,
)


def timed(recipe: str, seconds: float, **changes: object) -> RecipeCell:
    told = {"stage": "calibration", "dataset": "cxr", "seed": 0, "status": "finished"}
    return RecipeCell.model_validate(
        {"recipe": recipe, "seconds_per_step": seconds} | told | changes
    )


def short(cells: list[RecipeCell]) -> list[tuple[str, str, str, int]]:
    return [(cell.stage, cell.recipe, cell.dataset, cell.seed) for cell in cells]


@given(st.floats(0.1, 1e5), st.floats(1e-3, 1e2))
def test_planned_steps_take_the_budget_to_half_a_step_and_there_is_at_least_one(
    budget: float, seconds: float
) -> None:
    steps = planned_steps(budget, seconds)

    assert steps >= 1
    assert abs(steps * seconds - budget) <= max(0.51 * seconds, seconds if steps == 1 else 0)


def test_epochs_count_the_last_small_step_as_a_step() -> None:
    assert epochs_of(8, rows=30, batch=8) == 2
    assert epochs_of(6, rows=30, batch=8) == 1.5


def test_all_recipes_are_timed_first_on_every_set() -> None:
    config = table(
        shards={"cxr": "x", "oct": "y"}, recipes={"a": {"train": {"ema": 0.9}}}, calibration_steps=7
    )

    found = timed_cells(config)

    assert short(found) == [
        ("calibration", DEFAULT, "cxr", 0), ("calibration", "a", "cxr", 0),
        ("calibration", DEFAULT, "oct", 0), ("calibration", "a", "oct", 0),
    ]  # fmt: skip
    assert {cell.steps for cell in found} == {7}


def test_a_recipe_gets_the_seconds_that_the_default_needs_for_its_epochs_on_the_same_set() -> None:
    config = table(shards={"cxr": "x", "oct": "y"}, train={"epochs": 5})
    records = [
        timed(DEFAULT, 0.5, trained_steps=6, epochs=1.5), timed("a", 1.0), timed("b", 4.0),
        timed(DEFAULT, 0.5, trained_steps=6, epochs=0.1, dataset="oct"),
        timed("a", 0.5, dataset="oct"),
    ]  # fmt: skip

    found = screened_cells(config, records)

    assert [(cell.recipe, cell.dataset, cell.steps, cell.budget) for cell in found] == [
        (DEFAULT, "cxr", 20, 10), ("a", "cxr", 10, 10), ("b", "cxr", 2, 10),
        (DEFAULT, "oct", 300, 150), ("a", "oct", 300, 150),
    ]  # fmt: skip
    assert {cell.stage for cell in found} == {"screening"}


def test_seconds_are_the_budget_where_they_are_given() -> None:
    config = table(recipes={}, seconds=60)

    (found,) = screened_cells(config, [timed(DEFAULT, 0.5)])

    assert (found.recipe, found.steps, found.budget) == (DEFAULT, 120, 60)


@given(st.floats(0.01, 10), st.integers(1, 50), st.integers(1, 400), st.integers(2, 300))
def test_the_default_trains_for_its_epochs(
    seconds: float, epochs: int, per_epoch: int, steps: int
) -> None:
    config = table(train={"epochs": epochs})
    cell = timed(DEFAULT, seconds, trained_steps=steps, epochs=steps / per_epoch)

    (found,) = screened_cells(config, [cell])

    assert found.steps == epochs * per_epoch


def test_the_plan_does_not_depend_on_how_long_trainings_took() -> None:
    timings = [timed(DEFAULT, 0.5, trained_steps=6, epochs=1.5), timed("a", 1.0)]
    slow = screening(DEFAULT, 0.5, train_seconds=1e6, seconds_per_step=1e4)

    assert screened_cells(table(), [*timings, slow]) == screened_cells(table(), timings)


def test_without_a_timing_there_is_no_plan() -> None:
    failed = RecipeCell(stage="calibration", recipe=DEFAULT, dataset="cxr", seed=0, status="failed")
    default = timed(DEFAULT, 0.5, trained_steps=6, epochs=1.5)

    assert budget_of(table(), [failed], "cxr") is None
    assert screened_cells(table(), [failed, timed("a", 1.0)]) == []
    planned = screened_cells(table(), [default, failed.model_copy(update={"recipe": "a"})])
    assert [cell.recipe for cell in planned] == [DEFAULT]


RECORDS = [
    screening(DEFAULT, 0.5, steps=9, budget=10.0),
    screening("a", 0.9, steps=5, budget=10.0),
    screening("b", 0.7, steps=6, budget=10.0),
    screening("c", 0.8, steps=7, budget=10.0),
]


def test_the_default_and_the_finalists_get_the_other_seeds_with_the_same_steps() -> None:
    found = repeated_cells(table(finalists=2, seeds=[0, 1, 2]), RECORDS)

    assert [(cell.recipe, cell.seed, cell.steps) for cell in found] == [
        (DEFAULT, 1, 9), (DEFAULT, 2, 9), ("a", 1, 5), ("a", 2, 5), ("c", 1, 7), ("c", 2, 7),
    ]  # fmt: skip
    assert {cell.budget for cell in found} == {10.0}
    assert {(cell.stage, cell.status) for cell in found} == {("screening", "pending")}


def test_every_network_of_the_default_and_the_finalists_is_tested_once() -> None:
    config = table(finalists=1)
    records = [*RECORDS, screening(DEFAULT, 0.4, seed=1), screening("a", 0.1, seed=1)]

    found = final_cells(config, records)

    assert short(found) == [
        ("test", DEFAULT, "cxr", 0), ("test", DEFAULT, "cxr", 1),
        ("test", "a", "cxr", 0), ("test", "a", "cxr", 1),
    ]  # fmt: skip
    assert all(cell.figures == () for cell in found)


def test_a_network_that_failed_is_not_tested() -> None:
    records = [*RECORDS, screening("a", 0.1, seed=1, status="failed")]

    found = final_cells(table(finalists=1), records)

    assert [(cell.recipe, cell.seed) for cell in found] == [(DEFAULT, 0), ("a", 0)]


@given(st.lists(st.tuples(st.sampled_from([DEFAULT, "a", "b", "c"]), st.floats(0, 1)), max_size=8))
def test_what_comes_later_does_not_change_the_finalists(later) -> None:
    config = table(finalists=2)
    seeds = [screening(recipe, worst, seed=1) for recipe, worst in later]
    tests = [screening(recipe, worst, stage="test") for recipe, worst in later]

    assert chosen_finalists(config, [*RECORDS, *seeds, *tests]) == ("a", "c")
    assert repeated_cells(config, [*RECORDS, *tests]) == repeated_cells(config, RECORDS)


@given(st.lists(st.tuples(st.sampled_from([DEFAULT, "a"]), st.floats(0, 1)), max_size=6))
def test_tests_do_not_change_the_last_standings(later) -> None:
    config = table(finalists=1)
    records = [*RECORDS, screening(DEFAULT, 0.6, seed=1), screening("a", 0.1, seed=1)]
    tests = [screening(recipe, worst, stage="test") for recipe, worst in later]

    found = final_standings(config, [*records, *tests])

    assert found == final_standings(config, records)
    assert [(each.recipe, each.score) for each in found] == [
        (DEFAULT, pytest.approx(0.55)), ("a", pytest.approx(0.5)),
    ]  # fmt: skip
