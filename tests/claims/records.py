"""Records of what was measured, and the text that READMEs make of them.

A record is a JSON file in this folder: how something was measured, its figures, and a template in
Markdown. A README holds it between ``<!-- record: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date as Day
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
READMES = tuple(
    ROOT / folder / "README.md"
    for folder in ("", "jobs", "conf", "medspark", "tests", "tests/benchmarks", "tests/claims")
)

_PLACE = re.compile(r"\{(\w+)(\.command)?\}")
# A block without its own end must not swallow the next one.
_BLOCK = re.compile(
    r"(<!-- record: (?P<name>\w+)(?: (?P<part>\w+))? -->\n)"
    r"(?:(?!<!-- record).)*?(\n<!-- end -->)",
    re.DOTALL,
)

Form = Literal["number", "share", "percent"]


class Figure(BaseModel):
    """One measured figure: a value, with an interval or a standard deviation where there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    form: Form = "number"
    digits: int = Field(2, ge=0, description="after the decimal point")
    interval: Literal["", "quartiles", "extremes", "95 %"] = Field("", description="its kind")
    flagged: bool = Field(False, description="a sanity check says not to trust it")
    path: str = Field("", description="where the result document has it, for make claims")
    # Where one figure of a table was measured apart from the others.
    command: str = ""
    commit: str = Field("", pattern="^([0-9a-f]{7,40})?$")
    date: Day | None = None

    @model_validator(mode="after")
    def _interval_holds_value(self) -> Figure:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends")
        if (self.low is None) != (not self.interval):
            raise ValueError("an interval is of a kind: quartiles, extremes, 95 %")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("an interval ends above its beginning")
        return self

    def __str__(self) -> str:
        text = self._show(self.value) + (" %" if self.form == "percent" else "")
        if self.low is not None and self.high is not None:
            low, high = self._show(self.low), self._show(self.high)
            text = self._show(self.value)
            text += f" ({low}–{high})" if self.interval == "95 %" else f" [{low}, {high}]"
        if self.sd is not None:
            text += f" ± {self._show(self.sd)}"
        return f"⚠ {text}" if self.flagged else text

    def _show(self, number: float) -> str:
        text = f"{number:,.{self.digits}f}"
        if self.form != "share" or abs(number) >= 1:
            return text
        return "0" if number == 0 else text.replace("0.", ".", 1)


class Record(BaseModel):
    """What was measured, how, where and when, and how a README says it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str = Field(min_length=10, description="one sentence")
    commands: tuple[str, ...] = Field(min_length=1, description="in a shell, at the top level")
    result: str = Field("", description="the JSON that the last command writes, if one does")
    commit: str = Field(pattern="^[0-9a-f]{7,40}$", description="of the code that was measured")
    date: Day
    hardware: str
    seeds: tuple[int, ...] = ()
    minutes: float | None = Field(None, gt=0, description="that the commands took, if known")
    figures: Mapping[str, Figure]
    text: tuple[str, ...] = Field(description="lines of Markdown; {key} stands for a figure")
    parts: Mapping[str, tuple[str, ...]] = Field(
        default_factory=dict, description="shorter texts for other READMEs, by name"
    )

    @model_validator(mode="after")
    def _names_fit(self) -> Record:
        lines = [*self.text, *(line for part in self.parts.values() for line in part)]
        used = {name for line in lines for name, _ in _PLACE.findall(line)}
        if used != set(self.figures):
            odd = sorted(used ^ set(self.figures))
            raise ValueError(f"text and figures do not fit: {', '.join(odd)}")
        return self

    def render(self, part: str | None = None) -> str:
        """Return the Markdown of the record, or of one of its parts."""
        lines = self.text if part is None else self.parts[part]

        def said(match: re.Match[str]) -> str:
            figure = self.figures[match[1]]
            return self.command_of(figure) if match[2] else str(figure)

        return _PLACE.sub(said, "\n".join(lines))

    def command_of(self, figure: Figure) -> str:
        """Return the command that measures one of the figures."""
        return figure.command or self.commands[-1]


def read_records(folder: Path = FOLDER) -> dict[str, Record]:
    """Return every record of ``folder`` by the name of its file."""
    return {
        path.stem: Record.model_validate_json(path.read_bytes())
        for path in sorted(folder.glob("*.json"))
    }


def filled(text: str, records: Mapping[str, Record]) -> str:
    """Return a README's text with every block as its record says. Raises KeyError for no record."""

    def block(match: re.Match[str]) -> str:
        return match[1] + records[match["name"]].render(match["part"]) + match[4]

    return _BLOCK.sub(block, text)


def used(text: str) -> set[str]:
    """Return the names of the records that a README's text has blocks for."""
    return {match["name"] for match in _BLOCK.finditer(text)}
