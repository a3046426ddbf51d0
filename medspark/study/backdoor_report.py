"""Make the backdoor table, as Markdown, HTML and CSV, from the cells of adversaries x rules.

A cell is one federation: an adversary, an aggregation rule, a seed, and the share of honest clients
that hold tail images. Cells that differ only in the seed form one row.
"""

from __future__ import annotations

import csv
import html
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from medspark.config import Config
from medspark.evaluate.sanity import SIGN, SIGN_MEANS, Flag
from medspark.study.cells import CellRecord

__all__ = [
    "COLUMNS", "NOBODY", "BackdoorCell", "Column", "Point", "Row", "csv_text", "differs",
    "markdown", "page", "rows",
]  # fmt: skip

NOBODY = "none"  # the adversary's name in rows without an attack


class Point(Config):
    """What was measured after one round: success of the backdoor, and accuracy on clean images."""

    round: int
    success: float | None = None
    main: float | None = None


class BackdoorCell(CellRecord):
    """The record of one federation of the table."""

    adversary: str
    rule: str
    seed: int
    honest_edge: float = Field(0.0, description="share of honest clients that hold tail images")
    main: float | None = Field(None, description="accuracy on clean test images")
    worst: float | None = Field(None, description="worst-case accuracy under the attacks on images")
    success: float | None = Field(None, description="backdoor success when the attack ended")
    lasting: float | None = Field(None, description="backdoor success some rounds later")
    tpr: float | None = Field(None, description="share of malicious updates that were rejected")
    fpr: float | None = Field(None, description="share of honest updates that were rejected")
    aggregation_seconds: float | None = Field(None, description="mean of a round")
    curve: tuple[Point, ...] = ()

    @property
    def row(self) -> tuple[str, str, float]:
        """The key of the cell's row: adversary, rule, share of honest clients with tail images."""
        return self.adversary, self.rule, self.honest_edge

    @property
    def headline(self) -> str:
        """Accuracy and success, for the progress line."""
        return f"main {_percent(self.main)} %, success {_percent(self.success)} %"


@dataclass(frozen=True)
class Column:
    """One column of figures: its heading, its value in a cell, and how the value is written.

    ``flagged`` says whether a flag of the cell concerns the figure.
    """

    title: str
    value: Callable[[BackdoorCell], float | None]
    text: Callable[[float], str]
    flagged: Callable[[BackdoorCell], bool]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _worst_flagged(cell: BackdoorCell) -> bool:
    # A better attack can only lower the accuracy under attack, so 0 can be trusted.
    return cell.flagged and bool(cell.worst)


def _answers_flagged(cell: BackdoorCell) -> bool:
    return cell.clean_flagged


def _never(cell: BackdoorCell) -> bool:  # noqa: ARG001
    return False


COLUMNS: tuple[Column, ...] = (
    Column("main accuracy", lambda cell: cell.main, _percent, _answers_flagged),
    Column("worst case", lambda cell: cell.worst, _percent, _worst_flagged),
    Column("success", lambda cell: cell.success, _percent, _answers_flagged),
    Column("success later", lambda cell: cell.lasting, _percent, _answers_flagged),
    Column("TPR", lambda cell: cell.tpr, _percent, _never),
    Column("FPR", lambda cell: cell.fpr, _percent, _never),
    Column("aggregation, s", lambda cell: cell.aggregation_seconds, _seconds, _never),
)
_SETTINGS = ("adversary", "rule", "honest_edge", "seed")


@dataclass(frozen=True)
class Row:
    """The cells of one row, in the order of their seeds."""

    cells: tuple[BackdoorCell, ...]

    @property
    def first(self) -> BackdoorCell:
        """The first cell, which names the row's adversary and rule."""
        return self.cells[0]

    @property
    def flags(self) -> tuple[Flag, ...]:
        """The flags of the row's networks."""
        return tuple(flag for cell in self.cells for flag in cell.flags)

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons why cells of this row failed, each once."""
        return tuple(dict.fromkeys(cell.failure for cell in self.cells if cell.failure))

    def values(self, column: Column) -> list[float]:
        """Return the figures of the seeds that have one."""
        found = (column.value(cell) for cell in self.cells)
        return [value for value in found if value is not None]

    def mean(self, column: Column) -> float | None:
        """Return the mean over the seeds, None if no seed has the figure."""
        return statistics.fmean(values) if (values := self.values(column)) else None

    def flagged(self, column: Column) -> bool:
        """Return whether a flag of a seed concerns the figure in ``column``."""
        return any(column.flagged(cell) for cell in self.cells)


def rows(cells: Iterable[BackdoorCell]) -> list[Row]:
    """Return ``cells`` as rows, in the order of each row's first cell."""
    grouped: dict[tuple[str, str, float], list[BackdoorCell]] = {}
    for cell in cells:
        grouped.setdefault(cell.row, []).append(cell)
    return [Row(tuple(sorted(group, key=lambda cell: cell.seed))) for group in grouped.values()]


def differs(cell: BackdoorCell, cells: Iterable[BackdoorCell], *, margin: float) -> bool:
    """Return whether an attack makes a difference of ``margin`` or more to its rule.

    Main accuracy and success are compared with those of the same rule and seed without an attack.
    Cells without an attack, failed cells and cells without a comparison differ.
    """
    twin = (NOBODY, cell.rule, cell.honest_edge, cell.seed)
    calm = [c for c in cells if (*c.row, c.seed) == twin and c.main is not None]
    if cell.adversary == NOBODY or cell.main is None or not calm:
        return True
    pairs = [
        (cell.main, calm[0].main), (cell.success, calm[0].success), (cell.lasting, calm[0].lasting)
    ]  # fmt: skip
    return any(abs(here - (there or 0.0)) >= margin for here, there in pairs if here is not None)


class _Notes:
    """The footnotes, numbered in order of use; equal texts share one footnote."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _lines(table: Sequence[Row], notes: _Notes) -> list[list[str]]:
    """Return the table as rows of text; the first row is the heading."""
    edge = any(row.first.honest_edge for row in table)
    head = ["adversary", "rule", *(["honest with tail, %"] if edge else [])]
    lines = [[*head, *(column.title for column in COLUMNS)]]
    for row in table:
        cell = row.first
        names = [cell.adversary, cell.rule, *([_percent(cell.honest_edge)] if edge else [])]
        lines.append([*names, *(_text(row, column, notes) for column in COLUMNS)])
    return lines


def _text(row: Row, column: Column, notes: _Notes) -> str:
    values = row.values(column)
    if not values:
        text = "–" if any(cell.finished for cell in row.cells) else "not run"
    else:
        text = column.text(statistics.fmean(values))
        if len(values) > 1:
            text += f" ({column.text(min(values))}–{column.text(max(values))})"
    if row.failures and not values:
        text = f"failed [{notes.number('Failed: ' + '; '.join(row.failures))}]"
    if values and row.flagged(column):
        reasons = "; ".join(dict.fromkeys(flag.sentence for flag in row.flags))
        text = f"{SIGN} {text} [{notes.number(f'Flagged, do not trust: {reasons}.')}]"
    return text


def _legend(cells: Sequence[BackdoorCell], later: int, averaged: int) -> str:
    seeds = sorted({cell.seed for cell in cells})
    spread = "" if len(seeds) < 2 else " Means over the seeds, in brackets from lowest to highest."
    return (
        "Figures in %, when the attack ended. Success: share of tail images of other classes, or "
        "of images with the trigger on them, that get the attacker's class; later: "
        f"{later} rounds after the attack stopped; both as the mean of {averaged} rounds. TPR and "
        "FPR: shares of the malicious and of the honest updates that the rule rejected."
        f"{spread}" + (f" {SIGN_MEANS}" if any(cell.flagged for cell in cells) else "")
    )


def markdown(
    tables: Mapping[str, Sequence[BackdoorCell]],
    *,
    later: int,
    averaged: int,
    title: str,
    facts: Mapping[str, str],
    pictures: Sequence[str] = (),
) -> str:
    """Return the ``tables`` by heading as Markdown, with footnotes, pictures and facts.

    ``later`` is the number of rounds after which success is measured again, ``averaged`` the number
    of rounds that it is the mean of.
    """
    notes, lines = _Notes(), [f"# {title}", ""]
    for heading, cells in tables.items():
        head, *body = _lines(rows(cells), notes)
        rule = ["---" if name in ("adversary", "rule") else "---:" for name in head]
        lines += [f"## {heading}", "", *map(_piped, [head, rule, *body]), ""]
    every = [cell for cells in tables.values() for cell in cells]
    lines += [_legend(every, later, averaged), ""]
    lines += [line for n, text in enumerate(notes.texts, 1) for line in (f"[{n}] {text}", "")]
    lines += [f"![{picture}]({picture})" for picture in pictures]
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
img { max-width: 100% }
"""


def page(
    tables: Mapping[str, Sequence[BackdoorCell]],
    *,
    later: int,
    averaged: int,
    title: str,
    facts: Mapping[str, str],
    pictures: Sequence[str] = (),
) -> str:
    """Return the same as one HTML page, with the ``pictures`` beside it."""
    notes, parts = _Notes(), [f"<h1>{html.escape(title)}</h1>"]
    for heading, cells in tables.items():
        head, *body = _lines(rows(cells), notes)
        lines = [_html_row(head, "th"), *(_html_row(line, "td") for line in body)]
        parts += [f"<h2>{html.escape(heading)}</h2><table>{''.join(lines)}</table>"]
    every = [cell for cells in tables.values() for cell in cells]
    parts += [f"<p>{html.escape(_legend(every, later, averaged))}</p>"]
    parts += [f"<p>[{n}] {html.escape(text)}</p>" for n, text in enumerate(notes.texts, 1)]
    parts += [f'<img alt="{picture}" src="{picture}">' for picture in pictures]
    listed = (f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in facts.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}<ul>{''.join(listed)}</ul></html>\n"
    )


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def csv_text(cells: Iterable[BackdoorCell]) -> str:
    """Return every cell as a CSV line with its figures in [0, 1], its flags and its failure."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    figures = ["main", "worst", "success", "lasting", "tpr", "fpr", "aggregation_seconds"]
    writer.writerow([*_SETTINGS, *figures, "seconds", "flags", "failure"])
    for cell in cells:
        told = [getattr(cell, name) for name in (*_SETTINGS, *figures)]
        sentences = "; ".join(flag.sentence for flag in cell.flags)
        writer.writerow([*told, round(cell.seconds, 2), sentences, cell.failure])
    return buffer.getvalue()
