"""Draw success over the rounds, and success against honest clients that hold tail images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medspark.study.backdoor_report import NOBODY, BackdoorCell, Row, rows

__all__ = ["ablation_figure", "success_figure"]

_PANELS_IN_ROW = 3


def success_figure(cells: Sequence[BackdoorCell], *, stopped: int) -> Figure:
    """Draw backdoor success over the rounds, a panel for each adversary and a line for each rule.

    Several seeds are drawn as their mean. A dashed line marks the end of the attack, after
    ``stopped`` rounds.
    """
    measured = [row for row in rows(cells) if _curve(row)]
    names = list(dict.fromkeys(row.first.adversary for row in measured))
    colours = {rule: f"C{n}" for n, rule in enumerate(dict.fromkeys(c.rule for c in cells))}
    wide = min(_PANELS_IN_ROW, max(1, len(names)))
    high = max(1, math.ceil(len(names) / wide))
    figure = Figure(figsize=(1 + 3.6 * wide, 0.9 + 2.5 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        for row in (row for row in measured if row.first.adversary == name):
            curve, number = _curve(row), list(colours).index(row.first.rule)
            axes.plot(
                list(curve),
                [100 * value for value in curve.values()],
                color=colours[row.first.rule],
                ls="-" if number < 10 else "--",  # there are ten colours
                lw=1.2,
                label=row.first.rule,
            )
        axes.axvline(stopped, color="grey", ls="--", lw=1)
        title = "no attack" if name == NOBODY else name
        axes.set(title=title, ylim=(-3, 103), xlabel="rounds")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("backdoor success, %")
    _legend(figure)
    return figure


def _curve(row: Row) -> dict[int, float]:
    """Return the mean success over the seeds after each number of rounds that has one."""
    found: dict[int, list[float]] = {}
    for point in (point for cell in row.cells for point in cell.curve):
        if point.success is not None:
            found.setdefault(point.round + 1, []).append(point.success)
    return {rounds: statistics.fmean(values) for rounds, values in sorted(found.items())}


def ablation_figure(cells: Sequence[BackdoorCell]) -> Figure:
    """Draw success against the share of honest clients with tail images, a line for each row.

    Points are the seeds; the line is their mean.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    grouped: dict[tuple[str, str], dict[float, list[float]]] = {}
    for cell in cells:
        if cell.success is not None:
            line = grouped.setdefault((cell.adversary, cell.rule), {})
            line.setdefault(100 * cell.honest_edge, []).append(100 * cell.success)
    for number, ((adversary, rule), line) in enumerate(grouped.items()):
        shares, colour = sorted(line), f"C{number % 10}"
        means = [statistics.fmean(line[share]) for share in shares]
        axes.plot(shares, means, color=colour, label=f"{adversary}, {rule}")
        for share in shares:
            axes.plot([share] * len(line[share]), line[share], ".", color=colour)
    axes.set_xlabel("honest clients that hold tail images with their true class, %")
    axes.set_ylabel("backdoor success, %")
    axes.set_ylim(-3, 103)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Put one legend of all panels below the figure."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {
        label: handle
        for handles, labels in found
        for label, handle in zip(labels, handles, strict=True)
    }
    if named:
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=max(1, int(figure.get_figwidth() / 2.2)),
            fontsize=8,
        )
