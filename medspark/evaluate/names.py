"""Make user-chosen names of classes, models and data safe to show in figures and reports."""

from __future__ import annotations

import re
import textwrap

__all__ = ["in_markdown", "short", "wrapped"]

_LONGEST = 24
# Characters with a meaning in Markdown or HTML. _ has none within a word, and & has one only in an
# entity such as &lt;. Dollar signs delimit mathematics.
_MARKUP = re.compile(r"([\\`*\[\]<>|$~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))")


def short(name: str) -> str:
    """Return ``name`` on one line, cut to 24 printable characters."""
    line = _printable(name)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def wrapped(text: str, *, width: int, lines: int) -> str:
    """Return ``text`` wrapped to at most ``lines`` lines of at most ``width`` characters.

    In a Matplotlib figure, also pass ``parse_math=False``, because of dollar signs.
    """
    return textwrap.fill(_printable(text), width, max_lines=lines, placeholder="…")


def in_markdown(name: str) -> str:
    """Return ``name`` escaped for Markdown, on one line, so that it fits a table cell."""
    return _MARKUP.sub(r"\\\1", _printable(name))


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
