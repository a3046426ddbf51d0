"""Draw the paper's table: one panel per dataset and network, one group per training."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medspark.evaluate.names import wrapped
from medspark.evaluate.sanity import HOLLOW_MEANS
from medspark.study.paper_report import Column, MetricName, Row, TableCell, entry, rows

__all__ = ["paper_figure"]


def paper_figure(
    cells: Sequence[TableCell], shown: Sequence[Column], *, metric: MetricName = "accuracy"
) -> Figure:
    """Draw one bar per column and training, with intervals; flagged bars are hollow."""
    table = rows(cells)
    datasets = list(dict.fromkeys(row.first.dataset for row in table))
    models = list(dict.fromkeys(row.first.model for row in table))
    size = (1.2 + 3.1 * len(models), 0.8 + 2.4 * len(datasets))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(datasets), len(models), squeeze=False, sharey=True)
    for line, dataset in zip(panels, datasets, strict=True):
        for axes, model in zip(line, models, strict=True):
            chosen = [row for row in table if row.first.row[:2] == (dataset, model)]
            _draw(axes, chosen, shown, metric)
            title = wrapped(f"{model}, {dataset}", width=40, lines=2)
            axes.set_title(title, fontsize=9, parse_math=False)
        line[0].set_ylabel(f"{metric.replace('_', ' ')}, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(shown), 8), fontsize=8
        )
    if any(row.flagged(column, metric) for row in table for column in shown):
        figure.supxlabel(HOLLOW_MEANS, fontsize=8)
    return figure


def _draw(axes: Axes, chosen: Sequence[Row], shown: Sequence[Column], metric: MetricName) -> None:
    width = 0.8 / len(shown)
    for place, column in enumerate(shown):
        offset = (place - (len(shown) - 1) / 2) * width
        # The legend shows this empty bar, so that it stays filled if other bars are hollow.
        axes.bar([0], [0], width, color=f"C{place}", label=column.title)
        for number, row in enumerate(chosen):
            found = entry(row.cells, column, metric)
            if found is None:
                axes.text(number + offset, 2, "–", ha="center")
                continue
            (bar,) = axes.bar([number + offset], [100 * found.mean], width, color=f"C{place}")
            if row.flagged(column, metric):
                bar.set(facecolor="none", edgecolor=f"C{place}", linewidth=1.5)
            if found.low is not None and found.high is not None:
                ends = [100 * found.low, 100 * found.high]
                axes.plot([number + offset] * 2, ends, color="black", lw=1)
    names = [wrapped(row.first.training, width=20, lines=2) for row in chosen]
    axes.set_xticks(range(len(chosen)), names, fontsize=8, parse_math=False)
    axes.set_ylim(0, 102)
    axes.spines[["top", "right"]].set_visible(False)
