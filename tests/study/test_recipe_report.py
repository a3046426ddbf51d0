"""The table of recipes: both stages, seconds against the budget, flags, failures, the figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import pytest

from medspark.evaluate.result import CLEAN, WORST, Figure
from medspark.evaluate.sanity import SIGN, Flag
from medspark.study.recipe_figure import recipe_figure
from medspark.study.recipe_report import (
    OFF_SIGN,
    RecipeCell,
    RecipeEntry,
    Standing,
    csv_text,
    markdown,
)

EPS = 2 / 255
FLAG = Flag(name="unsteady", triggered=True, value=1.0, threshold=0.1, sentence="answers change")


def cell(recipe: str = "default", worst: float | None = 0.5, **changes: Any) -> RecipeCell:
    found = [] if worst is None else [
        Figure(attack=CLEAN, eps=0, metric="auroc", value=0.9),
        Figure(attack=WORST, eps=EPS, metric="auroc", value=worst),
    ]  # fmt: skip
    usual = {"stage": "screening", "dataset": "cxr", "seed": 0, "status": "finished"}
    return RecipeCell.model_validate({"recipe": recipe, "figures": found} | usual | changes)


def page(cells: Sequence[RecipeCell], **changes: Any) -> str:
    usual: dict[str, Any] = {
        "recipes": [], "screened": [], "finalists": (), "standings": [], "chosen": None, "facts": {}
    }  # fmt: skip
    return markdown(cells, **(usual | changes))


def line(text: str, start: str) -> dict[str, str]:
    lines = text.splitlines()
    at = next(n for n, each in enumerate(lines) if each.startswith(start))
    head = next(lines[n - 1] for n in range(at, 0, -1) if lines[n].startswith("| ---"))
    titles, values = ([p.strip() for p in each.strip("|").split("|")] for each in (head, lines[at]))
    return dict(zip(titles, values, strict=True))


def test_losers_stay_in_the_screening_and_a_row_is_the_mean_of_its_seeds() -> None:
    cells = [cell(seed=1, worst=0.7), cell("loser", worst=0.1), cell(worst=0.5)]

    text = page(cells)

    assert line(text, "| cxr | default")["worst 2/255 AUROC"] == "60.0 (50.0–70.0)"
    assert line(text, "| cxr | default")["seeds"] == "2"
    assert line(text, "| cxr | loser")["worst 2/255 AUROC"] == "10.0"
    assert line(text, "| cxr | loser")["worst 2/255 accuracy"] == "–"


def test_validation_and_test_figures_are_in_tables_of_their_own() -> None:
    text = page([cell(worst=0.5), cell(worst=0.3, stage="test")])

    before, after = text.split("## Test")
    assert line(before, "| cxr | default")["worst 2/255 AUROC"] == "50.0"
    assert line(after, "| cxr | default")["worst 2/255 AUROC"] == "30.0"


@pytest.mark.parametrize(("seconds", "marked"), [(10.9, False), (11.2, True), (8.9, True)])
def test_a_training_far_from_its_time_is_marked(seconds: float, marked: bool) -> None:
    text = page([cell("a", train_seconds=seconds, budget=10.0), cell(train_seconds=10.0)])

    assert line(text, "| cxr | a")["seconds"].startswith(OFF_SIGN) == marked
    assert line(text, "| cxr | a")["budget"] == "10"
    assert line(text, "| cxr | default")["budget"] == "–"
    assert ("over 10 % more or less" in text) == marked


def test_the_choice_comes_first_with_the_reason_why_another_is_none() -> None:
    standings = [Standing(recipe="a", score=0.6), Standing(recipe="b", score=0.9, reason="flagged")]

    text = page([], chosen="a", finalists=("a",), standings=standings)

    assert "Chosen on validation images: **a**. Finalists beside the default: a." in text
    assert line(text, "| a |")["can be chosen"] == "yes"
    assert line(text, "| b |")["can be chosen"] == "no: flagged"
    assert "No recipe can be chosen." in page([])


def test_flags_and_failures_are_marked_and_explained() -> None:
    cells = [
        cell("a", flags=(FLAG,)),
        cell("b", None, status="failed", failure="no memory"),
        cell("c", None, status="pending"),
    ]

    text = page(cells)

    assert line(text, "| cxr | a")["worst 2/255 AUROC"] == f"{SIGN} 50.0"
    assert line(text, "| cxr | a")["clean AUROC"] == "90.0"
    assert line(text, "| cxr | b")["clean AUROC"] == "failed"
    assert line(text, "| cxr | c")["clean AUROC"] == "not run"
    assert f"- {SIGN} screening of a on cxr, seed 0: answers change" in text
    assert "- failed: screening of b on cxr, seed 0: no memory" in text


def test_every_recipe_is_told_by_its_settings() -> None:
    recipe = RecipeEntry(name="wd", changes={"train.weight_decay": 0.1, "train.ema": 0.9})

    text = page([], recipes=[RecipeEntry(name="default"), recipe], facts={"command": "x"})

    assert "- recipe wd: train.weight_decay 0.1, train.ema 0.9" in text
    assert "- recipe default: the configured training" in text
    assert "- command: x" in text


def test_every_figure_is_a_line_of_csv_and_a_cell_without_figures_one_too() -> None:
    cells = [cell("a", flags=(FLAG,)), cell("b", None, stage="calibration", seconds_per_step=0.5)]

    read = list(csv.DictReader(io.StringIO(csv_text(cells))))

    assert [(r["stage"], r["recipe"], r["attack"], r["value"]) for r in read] == [
        ("screening", "a", "clean", "0.9"), ("screening", "a", "worst_case", "0.5"),
        ("calibration", "b", "", ""),
    ]  # fmt: skip
    assert (read[0]["flags"], read[2]["seconds_per_step"]) == ("answers change", "0.5")


def test_the_figure_has_a_point_for_each_recipe_and_set_and_flagged_ones_are_hollow() -> None:
    cells = [
        cell(), cell("a", 0.6, flags=(FLAG,)), cell("a", 0.7, dataset="oct"), cell("b", None),
        cell("a", 0.3, stage="test"), cell("a", 0.4, stage="test", seed=1),
    ]  # fmt: skip

    screened, tested = recipe_figure(cells, eps=EPS).axes

    def points(axes: Any) -> list[tuple[float, float, bool]]:
        return [
            (p.get_xdata()[0], p.get_ydata()[0], p.get_markerfacecolor() == "none")
            for p in axes.lines
            if len(p.get_xdata())
        ]

    assert points(screened) == [(90, 50, False), (90, 60, True), (90, 70, False)]
    assert points(tested) == [(90, pytest.approx(35), False)]


def test_the_progress_line_tells_speed_or_figures() -> None:
    assert cell("a", None, stage="calibration", seconds_per_step=0.25).headline == "0.25 s a step"
    assert cell("a", 0.5).headline == "AUROC clean: 0.900, worst case 2/255: 0.500"
