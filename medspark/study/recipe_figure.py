"""Draw the table of recipes: clean AUROC against worst-case AUROC, a point per recipe and set."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medspark.eps import eps_text
from medspark.evaluate.names import wrapped
from medspark.evaluate.result import CLEAN, WORST
from medspark.evaluate.sanity import HOLLOW_MEANS
from medspark.study.recipe_report import RecipeCell, Stage, rows

__all__ = ["recipe_figure"]

_MARKERS = "osD^vP*X"
_PANELS: tuple[tuple[Stage, str], ...] = (
    ("screening", "validation images, every recipe"),
    ("test", "test images, default and finalists"),
)


def recipe_figure(cells: Sequence[RecipeCell], *, eps: float) -> Figure:
    """Draw a panel per stage, a colour per recipe, and a marker per set; flagged ones are hollow.

    Points are means over the seeds, in %; the worst case is at ``eps``.
    """
    recipes = list(dict.fromkeys(cell.recipe for cell in cells))
    sets = list(dict.fromkeys(cell.dataset for cell in cells))
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), squeeze=False)[0]
    for axes, (stage, title) in zip(panels, _PANELS, strict=True):
        _draw(axes, rows(cells, stage), recipes=recipes, sets=sets, eps=eps)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("clean AUROC, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"worst-case AUROC at {eps_text(eps)}, %")
    # Empty points, so that the legend is the same whatever is drawn.
    for number, recipe in enumerate(recipes):
        name = wrapped(recipe, width=24, lines=1)
        panels[0].plot([], [], "o", color=f"C{number % 10}", label=name)
    for number, name in enumerate(sets):
        marker = _MARKERS[number % len(_MARKERS)]
        label = wrapped(name, width=24, lines=1)
        panels[0].plot([], [], marker, color="grey", label=label)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside right center", fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    if any(cell.flagged for cell in cells):
        figure.supxlabel(HOLLOW_MEANS, fontsize=8)
    return figure


def _draw(
    axes: Axes,
    table: Sequence[tuple[RecipeCell, ...]],
    *,
    recipes: Sequence[str],
    sets: Sequence[str],
    eps: float,
) -> None:
    for row in table:
        found = [
            (clean, worst)
            for cell in row
            if (clean := cell.value(CLEAN, "auroc")) is not None
            and (worst := cell.value(WORST, "auroc", eps)) is not None
        ]
        if not found:
            continue
        x, y = (100 * statistics.fmean(values) for values in zip(*found, strict=True))
        colour = f"C{recipes.index(row[0].recipe) % 10}"
        marker = _MARKERS[sets.index(row[0].dataset) % len(_MARKERS)]
        filling = "none" if any(cell.flagged for cell in row) else colour
        axes.plot([x], [y], marker, color=colour, markerfacecolor=filling)
