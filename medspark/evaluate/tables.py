"""Tables of text as Markdown and HTML, and the style of the reports' pages."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["STYLE", "html_table", "piped_table"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
td small { color: #777 }
.flagged { background: #fdecea; border-left: 4px solid #c62828; padding: .6rem 1rem }
.fine { background: #edf7ed; border-left: 4px solid #2e7d32; padding: .6rem 1rem }
img { max-width: 100% }
"""


def piped_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is the heading."""
    head, *body = rows
    return [_piped(head), _piped(["---", *["---:"] * (len(head) - 1)]), *map(_piped, body)]


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the first row is the heading."""
    head, *body = rows
    lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in body)
    return f"<table><tr>{_cells(head, 'th')}</tr>{lines}</table>"


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(cells: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
