"""Make the paper's table, as Markdown and CSV, from the figures of each trained network.

A cell is one attacked network (data, architecture, training, seed). Cells that differ only in the
seed form one row of the table.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from medspark.eps import eps_text, with_eps
from medspark.evaluate.names import in_markdown
from medspark.evaluate.result import CLEAN, WORST, Figure
from medspark.evaluate.sanity import SIGN, SIGN_MEANS, Flag
from medspark.study.cells import CellRecord

__all__ = [
    "METRICS",
    "Column",
    "Entry",
    "MetricName",
    "Row",
    "TableCell",
    "columns",
    "csv_text",
    "entry",
    "markdown",
    "rows",
]  # fmt: skip

MetricName = Literal["accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity"]
METRICS: tuple[MetricName, ...] = (
    "accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity",
)  # fmt: skip


class TableCell(CellRecord):
    """The record of one network of the table."""

    dataset: str
    train_images: int
    model: str
    training: str
    weights: str = Field(description="source of the initial weights")
    seed: int
    figures: tuple[Figure, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, document: Any) -> Any:
        """Read records of earlier versions, with eps in grey levels and flags as sentences."""
        if not isinstance(document, dict) or "doubts" not in document:
            return document
        found = with_eps(document)
        doubts, failure = found.pop("doubts"), found.pop("failure", None)
        status = "failed" if failure else "finished" if found.get("figures") else "pending"
        flags = [
            {"name": "earlier", "triggered": True, "value": 0, "threshold": 0, "sentence": doubt}
            for doubt in doubts
        ]
        return found | {"status": status, "failure": failure or "", "flags": flags}

    @property
    def row(self) -> tuple[str, str, str]:
        """The key of the cell's row: dataset, network and training."""
        return self.dataset, self.model, self.training

    def flags_figure(self, attack: str) -> bool:
        """Return whether a flag concerns the figures under ``attack`` ("clean" included)."""
        return self.clean_flagged if attack == CLEAN else self.flagged


_TITLES = {
    "fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "square": "Square", "autoattack": "AutoAttack",
    WORST: "worst case",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of figures."""

    attack: str
    eps: float = 0.0

    @property
    def title(self) -> str:
        """The heading of the column."""
        name = _TITLES.get(self.attack, self.attack)
        return name if self.attack == CLEAN else f"{name} {eps_text(self.eps)}"


@dataclass(frozen=True)
class Entry:
    """One figure of the table: the mean over seeds.

    ``sd`` is the standard deviation over seeds, None for one seed. ``low`` and ``high`` span the
    seeds' 95 % intervals.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """The cells of one row, in the order of their seeds."""

    cells: tuple[TableCell, ...]

    @property
    def first(self) -> TableCell:
        """The first cell, which names the row's dataset, network and training."""
        return self.cells[0]

    @property
    def flags(self) -> tuple[Flag, ...]:
        """The flags of the row's networks."""
        return tuple(flag for cell in self.cells for flag in cell.flags)

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons why cells of this row failed, each once."""
        reasons = (cell.failure for cell in self.cells if cell.failure)
        return tuple(dict.fromkeys(reasons))

    def flagged(self, column: Column, metric: MetricName) -> bool:
        """Return whether the figure in ``column`` should not be trusted.

        A figure of 0 under attack can be trusted, because a better attack cannot lower it. Figures
        on clean images can be trusted unless a flag concerns the clean predictions.
        """
        found = entry(self.cells, column, metric)
        if found is None or not any(cell.flags_figure(column.attack) for cell in self.cells):
            return False
        return column.attack == CLEAN or found.mean > 0


def columns(
    eps: Iterable[float],
    *,
    attacks: Iterable[str] = ("fgsm",),
    named: Iterable[str] = ("fgsm", "transfer"),
) -> list[Column]:
    """Return the columns of a table under the budgets ``eps``.

    Of ``attacks``, those ``named`` have their own columns; the worst case covers all attacks.
    """
    run = set(attacks)
    shown = [attack for attack in named if attack in run]
    attacked = [Column(attack, budget) for budget in sorted(set(eps)) for attack in (*shown, WORST)]
    return [Column(CLEAN), *attacked]


def rows(cells: Iterable[TableCell]) -> list[Row]:
    """Return ``cells`` as rows, in the order of each row's first cell."""
    grouped: dict[tuple[str, str, str], list[TableCell]] = {}
    for cell in cells:
        grouped.setdefault(cell.row, []).append(cell)
    return [Row(tuple(sorted(group, key=lambda cell: cell.seed))) for group in grouped.values()]


def entry(cells: Iterable[TableCell], column: Column, metric: MetricName) -> Entry | None:
    """Return the figure over ``cells``, which differ only in the seed; None if no cell has it."""
    found = [
        figure
        for cell in cells
        for figure in cell.figures
        if (figure.attack, figure.eps, figure.metric) == (column.attack, column.eps, metric)
    ]
    if not found:
        return None
    values = [figure.value for figure in found]
    lows = [figure.low for figure in found if figure.low is not None]
    highs = [figure.high for figure in found if figure.high is not None]
    return Entry(
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        low=min(lows, default=None),
        high=max(highs, default=None),
    )


def markdown(
    cells: Sequence[TableCell],
    shown: Sequence[Column],
    *,
    metric: MetricName,
    title: str,
    facts: Mapping[str, str],
) -> str:
    """Return the table as Markdown, with footnotes and the facts needed to reproduce it."""
    notes = _Notes()
    head = ["dataset", "training images", "network", "first weights", "training"]
    table = [
        [*head, *(column.title for column in shown)],
        ["---", "---:", "---", "---", "---", *("---:" for _ in shown)],
        *(_row(row, shown, metric, notes) for row in rows(cells)),
    ]
    lines = [f"# {title}", "", *("| " + " | ".join(line) + " |" for line in table), ""]
    lines += [_legend(cells, metric), "", *notes.lines()]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


class _Notes:
    """The footnotes, numbered in order of use; equal texts share one footnote."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self._texts:
            self._texts.append(text)
        return self._texts.index(text) + 1

    def lines(self) -> list[str]:
        numbered = [f"[{number}] {text}" for number, text in enumerate(self._texts, 1)]
        return [line for text in numbered for line in (text, "")]


def _row(row: Row, shown: Sequence[Column], metric: MetricName, notes: _Notes) -> list[str]:
    cell = row.first
    head = [cell.dataset, str(cell.train_images), cell.model, cell.weights, cell.training]
    return [*map(in_markdown, head), *(_text(row, column, metric, notes) for column in shown)]


def _text(row: Row, column: Column, metric: MetricName, notes: _Notes) -> str:
    found = entry(row.cells, column, metric)
    text = "not run" if found is None else _figure(found)
    if row.failures:
        number = notes.number(f"Failed: {'; '.join(row.failures)}")
        text = f"failed [{number}]" if found is None else f"{text} (some seeds failed [{number}])"
    if row.flagged(column, metric):
        reasons = "; ".join(dict.fromkeys(flag.sentence for flag in row.flags))
        text = f"{SIGN} {text} [{notes.number(f'**Flagged, do not trust**: {reasons}.')}]"
    return text


def _figure(found: Entry) -> str:
    text = _percent(found.mean)
    if found.sd is not None:
        text += f" ± {_percent(found.sd)}"
    if found.low is not None and found.high is not None:
        text += f" ({_percent(found.low)}–{_percent(found.high)})"
    return text


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _legend(cells: Sequence[TableCell], metric: MetricName) -> str:
    seeds = sorted({cell.seed for cell in cells})
    name = "AUROC" if metric == "auroc" else metric.replace("_", " ").capitalize()
    spread = (
        "in brackets its 95 % interval"
        if len(seeds) == 1
        else f"mean ± standard deviation over {len(seeds)} seeds, in brackets from the lowest to "
        "the highest end of their 95 % intervals"
    )
    return (
        f"{name} on the test images in %, {spread}. The worst case takes, for every image, the "
        "most harmful attack at this budget or a smaller one."
        + (f" {SIGN_MEANS}" if any(cell.flagged for cell in cells) else "")
    )


def csv_text(cells: Iterable[TableCell]) -> str:
    """Return a CSV line for every figure; a failed cell has one line without a figure."""
    buffer = io.StringIO()
    kept = ["dataset", "train_images", "model", "weights", "training", "seed"]
    fields = [*kept, *Figure.model_fields, "believable", "flags", "failure"]
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        about = {name: getattr(cell, name) for name in kept}
        sentences = "; ".join(flag.sentence for flag in cell.flags)
        about |= {"flags": sentences, "failure": cell.failure}
        if not cell.figures:
            writer.writerow(about)
        for figure in cell.figures:
            believable = not cell.flags_figure(figure.attack)
            writer.writerow(about | figure.model_dump() | {"believable": believable})
    return buffer.getvalue()
