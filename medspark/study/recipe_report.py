"""Make the table of recipes, as Markdown, CSV and a figure, from the records of its cells.

A cell times a recipe, screens it on validation images, or tests it on test images. Cells of one
stage that differ only in the seed form one row of the stage's table.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from medspark.eps import eps_text
from medspark.evaluate.names import in_markdown
from medspark.evaluate.result import CLEAN, WORST, Figure
from medspark.evaluate.sanity import SIGN, SIGN_MEANS
from medspark.job import Result
from medspark.study.cells import CellRecord

__all__ = [
    "DEFAULT", "RecipeCell", "RecipeEntry", "RecipeTableResult", "Stage", "Standing", "csv_text",
    "markdown", "rows",
]  # fmt: skip

DEFAULT = "default"
Stage = Literal["calibration", "screening", "test"]
# A training that took so much more or less time than planned is marked.
_OFF = 0.1
OFF_SIGN = "≠"


class RecipeCell(CellRecord):
    """The record of one recipe on one set, with one seed, in one stage."""

    stage: Stage = Field(
        description="calibration times the steps, screening attacks validation images, test "
        "attacks test images"
    )
    recipe: str
    dataset: str
    seed: int
    steps: int | None = Field(None, description="planned steps")
    budget: float | None = Field(
        None, description="seconds of training that every recipe gets on this set"
    )
    trained_steps: int | None = Field(None, description="steps that were taken")
    epochs: float | None = Field(None, description="passes over the training images")
    seconds_per_step: float | None = None
    train_seconds: float | None = Field(
        None, description="seconds of all steps, without start-up and validation"
    )
    figures: tuple[Figure, ...] = Field(
        (), description="on validation images in screening, on test images in test"
    )

    @property
    def row(self) -> tuple[str, str]:
        """The key of the cell's row: set and recipe."""
        return self.dataset, self.recipe

    @property
    def off(self) -> float | None:
        """How far the training time is from the budget, as a share of it; None if unknown."""
        if self.budget is None or self.train_seconds is None:
            return None
        return self.train_seconds / self.budget - 1

    @property
    def other_time(self) -> bool:
        """Whether the training took over 10 % more or less time than planned."""
        return self.off is not None and abs(self.off) > _OFF

    @property
    def headline(self) -> str:
        """What the progress line says of a finished cell."""
        if self.stage == "calibration":
            return f"{self.seconds_per_step or 0:.3g} s a step"
        worst = [f for f in self.figures if f.attack == WORST and f.metric == "auroc"]
        found = ", ".join(f"{eps_text(f.eps)}: {f.value:.3f}" for f in worst)
        clean = self.value(CLEAN, "auroc")
        return f"AUROC clean: {0 if clean is None else clean:.3f}, worst case {found}"

    def value(self, attack: str, metric: str, eps: float = 0.0) -> float | None:
        """Return one figure, or None if it is undefined or was not measured."""
        wanted = attack, eps, metric
        found = (f.value for f in self.figures if (f.attack, f.eps, f.metric) == wanted)
        return next(found, None)


class Standing(Result):
    """How a recipe did on the validation images, over all sets and the seeds seen so far."""

    recipe: str
    score: float | None = Field(
        None, description="worst case at the training eps on validation images, mean over the sets"
    )
    clean: dict[str, float] = Field({}, description="clean AUROC on validation images, by set")
    reason: str = Field("", description="why it cannot be chosen; empty if it can")

    @property
    def eligible(self) -> bool:
        """Whether the recipe can be chosen."""
        return self.score is not None and not self.reason


class RecipeEntry(Result):
    """A recipe: its name, and the settings in which it differs from the default."""

    name: str
    changes: dict[str, Any] = Field({}, description="values by dotted keys, as train.ema")

    def __str__(self) -> str:
        told = ", ".join(f"{key} {value}" for key, value in self.changes.items())
        return told or "the configured training"


class RecipeTableResult(Result):
    """The result document of jobs/recipe_table.py."""

    cells: tuple[RecipeCell, ...]
    recipes: tuple[RecipeEntry, ...]
    screened: tuple[Standing, ...] = Field(description="all recipes, by one seed, the best first")
    finalists: tuple[str, ...] = Field(description="recipes that were tested beside the default")
    standings: tuple[Standing, ...] = Field(description="default and finalists, by all seeds")
    chosen: str | None = Field(description="the best on validation images; None: none is eligible")
    table: str = Field(description="path of the table, Markdown")
    csv: str = Field(description="path of all figures")
    figure: str = Field(description="path of the figure")
    mlflow: dict[str, Any] = Field({}, description="where to find the run")


_METRICS = (("accuracy", "accuracy"), ("balanced_accuracy", "balanced"), ("auroc", "AUROC"))


def rows(cells: Iterable[RecipeCell], stage: Stage) -> list[tuple[RecipeCell, ...]]:
    """Return the cells of ``stage`` as rows of one set and recipe, in the order of their seeds."""
    grouped: dict[tuple[str, str], list[RecipeCell]] = {}
    for cell in cells:
        if cell.stage == stage:
            grouped.setdefault(cell.row, []).append(cell)
    return [tuple(sorted(group, key=lambda cell: cell.seed)) for group in grouped.values()]


def markdown(
    cells: Sequence[RecipeCell],
    *,
    recipes: Sequence[RecipeEntry],
    screened: Sequence[Standing],
    finalists: Sequence[str],
    standings: Sequence[Standing],
    chosen: str | None,
    facts: Mapping[str, str],
) -> str:
    """Return the choice, the tables of both stages, marks explained, and the ``facts``."""
    lines = ["# Recipes at equal training time", "", _choice(chosen, finalists), ""]
    lines += [*_standings(standings or screened), ""]
    lines += ["## Screening: every recipe, on validation images", ""]
    lines += [*_table(cells, "screening"), ""]
    lines += ["## Test: the default and the finalists, on test images", ""]
    lines += [*_table(cells, "test"), "", _legend(cells), "", "![AUROC](recipes.png)", ""]
    lines += [f"- {SIGN} {_name(c)}: {flag.sentence}" for c in cells for flag in c.flags]
    lines += [f"- failed: {_name(c)}: {c.failure}" for c in cells if c.failure]
    lines += [f"- recipe {in_markdown(recipe.name)}: {recipe}" for recipe in recipes]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def csv_text(cells: Iterable[RecipeCell]) -> str:
    """Return a CSV line for every figure; a cell without figures has one line."""
    buffer = io.StringIO()
    kept = ["stage", "dataset", "recipe", "seed", "steps", "trained_steps", "epochs", "budget",
            "seconds_per_step", "train_seconds", "other_time", "status", "failure"]  # fmt: skip
    fields = [*kept, *Figure.model_fields, "flags"]
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        about = {name: getattr(cell, name) for name in kept}
        about["flags"] = "; ".join(flag.sentence for flag in cell.flags)
        if not cell.figures:
            writer.writerow(about)
        for figure in cell.figures:
            writer.writerow(about | figure.model_dump())
    return buffer.getvalue()


def _choice(chosen: str | None, finalists: Sequence[str]) -> str:
    against = f"Finalists beside the default: {', '.join(map(in_markdown, finalists)) or 'none'}."
    if chosen is None:
        return f"No recipe can be chosen. {against}"
    return f"Chosen on validation images: **{in_markdown(chosen)}**. {against}"


def _standings(standings: Sequence[Standing]) -> list[str]:
    lines = ["| recipe | score on validation images | can be chosen |", "| --- | ---: | --- |"]
    for each in standings:
        answer = "yes" if each.eligible else f"no: {each.reason or 'no score'}"
        lines.append(_piped([in_markdown(each.recipe), _percent(each.score), answer]))
    return lines


def _table(cells: Sequence[RecipeCell], stage: Stage) -> list[str]:
    shown = rows(cells, stage)
    budgets = sorted({f.eps for c in cells if c.stage == stage for f in c.figures if f.eps > 0})
    head = ["set", "recipe", "seeds", "epochs", "seconds", "budget", "clean AUROC",
            "clean balanced"]  # fmt: skip
    columns = [(CLEAN, 0.0, "auroc"), (CLEAN, 0.0, "balanced_accuracy")]
    for eps in budgets:
        head += [f"worst {eps_text(eps)} {title}" for _, title in _METRICS]
        columns += [(WORST, eps, metric) for metric, _ in _METRICS]
    lines = [_piped(head), _piped(["---", "---", *("---:" for _ in head[2:])])]
    for row in shown:
        first = row[0]
        about = [in_markdown(first.dataset), in_markdown(first.recipe), str(len(row))]
        time = [_spread([c.epochs for c in row], "{:.2g}"), _seconds(row), _budget(row)]
        values = [_text(row, attack, metric, eps) for attack, eps, metric in columns]
        lines.append(_piped([*about, *time, *values]))
    return lines if shown else ["Nothing yet."]


def _seconds(row: Sequence[RecipeCell]) -> str:
    text = _spread([cell.train_seconds for cell in row], "{:.3g}")
    return f"{OFF_SIGN} {text}" if any(cell.other_time for cell in row) else text


def _budget(row: Sequence[RecipeCell]) -> str:
    budget = row[0].budget
    return "–" if budget is None else f"{budget:.3g}"


def _text(row: Sequence[RecipeCell], attack: str, metric: str, eps: float) -> str:
    values = [cell.value(attack, metric, eps) for cell in row]
    if all(value is None for value in values):
        unfinished = next((c.status for c in row if not c.finished), None)
        return "–" if unfinished is None else {"pending": "not run"}.get(unfinished, unfinished)
    text = _spread([None if v is None else 100 * v for v in values], "{:.1f}")
    if not all(cell.finished for cell in row):
        text += " (some seeds are missing)"
    flagged = any(c.clean_flagged if attack == CLEAN else c.flagged for c in row)
    return f"{SIGN} {text}" if flagged else text


def _spread(values: Iterable[float | None], form: str) -> str:
    """Return the mean and, of several values, the extremes."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    text = form.format(statistics.fmean(found))
    if len(found) > 1:
        text += f" ({form.format(min(found))}–{form.format(max(found))})"
    return text


def _legend(cells: Sequence[RecipeCell]) -> str:
    text = (
        "Figures in %; means over the seeds, in brackets from lowest to highest. The worst case "
        "takes, for every image, the most harmful attack at this eps or a smaller one. Seconds are "
        "those of the training steps, without start-up, validation and pauses; the budget is the "
        "planned time."
    )
    if any(cell.other_time for cell in cells):
        text += f" {OFF_SIGN}: over 10 % more or less time than planned."
    return text + (f" {SIGN_MEANS}" if any(cell.flagged for cell in cells) else "")


def _name(cell: RecipeCell) -> str:
    named = f"{in_markdown(cell.recipe)} on {in_markdown(cell.dataset)}"
    return f"{cell.stage} of {named}, seed {cell.seed}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _piped(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
