"""Make the table of prunings: networks x methods x sparsities, as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from pydantic import Field

from medspark.evaluate.sanity import HOLLOW_MEANS, SIGN, SIGN_MEANS
from medspark.study.cells import CellRecord

__all__ = ["PruneCell", "csv_text", "markdown", "prune_figure", "rows"]


class PruneCell(CellRecord):
    """The record of one pruning. Accuracies are in [0, 1]; those of noise are with the noise on."""

    model: str
    method: str
    sparsity: float = Field(description="share of zeros that was asked for")
    seed: int
    zeros: float | None = Field(None, description="share of zeros in the saved file")
    clean: float | None = None
    pgd: float | None = Field(None, description="under the first attack on cross-entropy, PGD")
    worst: float | None = Field(None, description="each image under the worst of the attacks")
    noise_clean: float | None = None
    noise_pgd: float | None = Field(None, description="PGD that follows one draw per step")
    noise_worst: float | None = Field(None, description="the worst of PGD, EOT-PGD and transfer")
    masked: float | None = Field(None, description="share of the noise's gain that is masking")
    network: str = Field("", description="folder of the pruned network")

    @property
    def row(self) -> tuple[str, float, str]:
        """The key of the cell's row."""
        return self.model, self.sparsity, self.method

    @property
    def headline(self) -> str:
        """Accuracies, for the progress line."""
        return f"clean {_percent(self.clean)} %, worst case {_percent(self.worst)} %"


@dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[PruneCell], float | None]
    attacked: bool = True


_COLUMNS = (
    _Column("zeros", lambda cell: cell.zeros, attacked=False),
    _Column("clean", lambda cell: cell.clean, attacked=False),
    _Column("PGD", lambda cell: cell.pgd),
    _Column("worst case", lambda cell: cell.worst),
    _Column("noise: clean", lambda cell: cell.noise_clean, attacked=False),
    _Column("noise: PGD", lambda cell: cell.noise_pgd),
    _Column("noise: worst", lambda cell: cell.noise_worst),
    _Column("masking", lambda cell: cell.masked),
)
_MEANING = (
    "Figures in %. Without `noise:`, networks compute without noise in their weights. The worst "
    "with noise is of PGD, EOT-PGD and PGD without noise; masking is the share of what the noise "
    "seems to add under PGD that these attacks take back."
)


def rows(cells: Iterable[PruneCell]) -> list[tuple[PruneCell, ...]]:
    """Return ``cells`` as rows of equal settings but the seed, in order of their first cell."""
    grouped: dict[tuple[str, float, str], list[PruneCell]] = {}
    for cell in cells:
        grouped.setdefault(cell.row, []).append(cell)
    return [tuple(sorted(group, key=lambda cell: cell.seed)) for group in grouped.values()]


def markdown(cells: Sequence[PruneCell], *, facts: Mapping[str, str]) -> str:
    """Return the table with its legend, the reasons of flags and failures, and the ``facts``."""
    head = ["network", "sparsity", "method", *(column.title for column in _COLUMNS)]
    lines = ["# Pruned and attacked", "", _piped(head)]
    lines.append(_piped(["---", "---:", "---", *("---:" for _ in _COLUMNS)]))
    for row in rows(cells):
        model, sparsity, method = row[0].row
        name = "none" if sparsity == 0 and method == "magnitude" else method
        values = [_text(row, column) for column in _COLUMNS]
        lines.append(_piped([model, f"{100 * sparsity:g}", name, *values]))
    spread = (
        "" if len({c.seed for c in cells}) < 2 else " Means, in brackets from lowest to highest."
    )
    flags = f" {SIGN_MEANS}" if any(cell.flagged for cell in cells) else ""
    lines += ["", _MEANING + spread + flags, "", "![accuracy over sparsity](prune.png)", ""]
    lines += [f"- {SIGN} {_name(c)}: {flag.sentence}" for c in cells for flag in c.flags]
    lines += [f"- failed: {_name(c)}: {c.failure}" for c in cells if c.failure]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def csv_text(cells: Iterable[PruneCell]) -> str:
    """Return every cell as a line of CSV."""
    names = [n for n in PruneCell.model_fields if n != "flags"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "flags"])
    for cell in cells:
        sentences = "; ".join(flag.sentence for flag in cell.flags)
        writer.writerow([*(getattr(cell, name) for name in names), sentences])
    return buffer.getvalue()


def prune_figure(cells: Sequence[PruneCell]) -> Figure:
    """Draw the worst case over sparsity: a panel per network, a line per method.

    A dashed line is the network without pruning. Flagged points are hollow.
    """
    models = list(dict.fromkeys(cell.model for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    size = (1 + 4 * max(len(models), 1), 3.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(len(models), 1), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=False):
        for number, method in enumerate(methods):
            points = sorted(
                (row[0].sparsity, statistics.fmean(found), any(c.flagged for c in row))
                for row in rows(cells)
                if row[0].model == model and row[0].method == method
                if (found := [c.worst for c in row if c.worst is not None])
            )
            colour = f"C{number}"
            where = [100 * sparsity for sparsity, _, _ in points]
            axes.plot(where, [100 * y for _, y, _ in points], color=colour, lw=1.2, label=method)
            for x, (_, y, flagged) in zip(where, points, strict=True):
                axes.plot([x], [100 * y], "o", color=colour, mfc="none" if flagged else colour)
        dense = [c.worst for c in cells if c.row == (model, 0.0, "magnitude") and c.worst]
        if dense:
            axes.axhline(100 * statistics.fmean(dense), color="grey", ls="--", lw=1)
        axes.set(xlabel="sparsity, %")
        axes.set_title(model, fontsize=9, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy in the worst case, %")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    if any(cell.flagged for cell in cells):
        figure.supxlabel(HOLLOW_MEANS, fontsize=8)
    return figure


def _text(row: Sequence[PruneCell], column: _Column) -> str:
    values = [value for cell in row if (value := column.value(cell)) is not None]
    if not values:
        unfinished = next((c.status for c in row if not c.finished), None)
        return "–" if unfinished is None else {"pending": "not run"}.get(unfinished, unfinished)
    text = _percent(statistics.fmean(values))
    if len(values) > 1:
        text += f" ({_percent(min(values))}–{_percent(max(values))})"
    flagged = any(c.flagged if column.attacked else c.clean_flagged for c in row)
    return f"{SIGN} {text}" if flagged else text


def _name(cell: PruneCell) -> str:
    return f"{cell.model}, {cell.method} at {100 * cell.sparsity:g} %, seed {cell.seed}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _piped(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
