"""Figures and reports show any class name as plain text."""

from __future__ import annotations

import io
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from medspark.evaluate.names import in_markdown, short, wrapped

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    st.sampled_from("$\\^_{}|<>&*`[]()~#!\n\t ab"), max_size=60
)


@given(NAMES)
def test_a_short_name_is_one_printable_line_that_begins_as_the_name_does(name):
    shown = short(name)

    assert shown.isprintable()
    assert len(shown) <= 24
    words = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert shown == words or (len(words) > 24 and shown == words[:23] + "…")


@given(NAMES, st.integers(2, 40), st.integers(1, 3))
def test_wrapped_text_keeps_to_its_lines(name, width, lines):
    found = wrapped(name, width=width, lines=lines).split("\n")

    assert len(found) <= lines
    assert all(line.isprintable() and len(line) <= width for line in found)
    assert wrapped("one two", width=3, lines=2) == "one\ntwo"
    assert wrapped("one two six", width=5, lines=2) == "one\ntwo…"


@given(NAMES)
def test_a_figure_draws_any_name(name):
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.subplots().set_title(wrapped(name, width=30, lines=3), parse_math=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("NORMAL", "NORMAL"),
        ("a|b", r"a\|b"),
        ("<b>A</b>", r"\<b\>A\</b\>"),
        ("$x$ and `y`", r"\$x\$ and \`y\`"),
        ("[a](javascript:b)", r"\[a\](javascript:b)"),
        ("**bold** _it_ ~~no~~", r"\*\*bold\*\* \_it\_ \~\~no\~\~"),
        ("resnet_50 & co", "resnet_50 & co"),
        ("&lt; &#60; back\\slash", r"\&lt; \&#60; back\\slash"),
        ("two\n\n| lines", r"two \| lines"),
    ],
)
def test_markdown_shows_a_name_as_it_is(name, escaped):
    assert in_markdown(name) == escaped


@given(NAMES)
def test_a_name_stays_in_its_cell_of_a_markdown_table(name):
    cell = in_markdown(name)

    assert cell.isprintable()
    unescaped = cell.replace("\\\\", "")
    assert not any(f"{mark}" in unescaped.replace(f"\\{mark}", "") for mark in "|<>$`*[]~")
