"""Names that users chose, of classes, models and data, as figures and reports can show them."""

from __future__ import annotations

import re
import textwrap

__all__ = ["in_markdown", "short", "wrapped"]

_LONGEST = 24
# What Markdown, or the HTML in it, takes for more than text: _ is text within a word, and & but in
# &lt; and its like. Dollar signs are mathematics.
_MARKUP = re.compile(r"([\\`*\[\]<>|$~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))")


def short(name: str) -> str:
    """Return ``name`` as a few printable characters on one line."""
    line = _printable(name)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def wrapped(text: str, *, width: int, lines: int) -> str:
    """Return ``text`` on at most so many lines of at most ``width`` characters.

    For a figure, where dollar signs need ``parse_math=False`` besides.
    """
    return textwrap.fill(_printable(text), width, max_lines=lines, placeholder="…")


def in_markdown(name: str) -> str:
    """Return Markdown that shows ``name``, and does nothing else, on one line and in one cell."""
    return _MARKUP.sub(r"\\\1", _printable(name))


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
