"""Every figure of a README is what its record says."""

from __future__ import annotations

import re
import subprocess

import pytest
from measure import is_within, look_up
from picture import drawn_from, sources
from pydantic import ValidationError
from records import FOLDER, READMES, ROOT, Figure, Record, filled, read_records, used

RECORDS = read_records()


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_readme_says_what_the_records_say(path):
    text = path.read_text(encoding="utf-8")

    assert filled(text, RECORDS) == text


def test_every_record_is_in_a_readme():
    texts = [path.read_text(encoding="utf-8") for path in READMES]

    assert set.union(*map(used, texts)) == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_names_a_commit_of_this_project(name):
    if _git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("this is no checkout with its history: no commits to look up")
    commits = {RECORDS[name].commit, *(f.commit for f in RECORDS[name].figures.values())} - {""}

    assert [_git("cat-file", "-t", commit).strip() for commit in commits] == ["commit"] * len(
        commits
    )


def test_a_changed_figure_changes_the_readme():
    record = RECORDS["xrays"]
    figure = record.figures["defended_clean_auroc"].model_copy(update={"value": 0.5})
    changed = record.model_copy(
        update={"figures": {**record.figures, "defended_clean_auroc": figure}}
    )
    text = (FOLDER / "README.md").read_text(encoding="utf-8")

    assert filled(text, RECORDS | {"xrays": changed}) != text


def test_a_template_with_a_figure_that_nobody_measured_is_refused():
    values = RECORDS["xrays"].model_dump()

    with pytest.raises(ValidationError, match="do not fit: guessed"):
        Record.model_validate(values | {"text": (*values["text"], "{guessed}")})


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(value=0.944, form="share", digits=3), ".944"),
        (Figure(value=7, form="percent", digits=1), "7.0 %"),
        (Figure(value=0.7, low=0.69, high=0.75, interval="quartiles"), "0.70 [0.69, 0.75]"),
        (Figure(value=78.9, low=71.2, high=85.5, interval="95 %", digits=1), "78.9 (71.2–85.5)"),
        (Figure(value=0.949, sd=0.003, form="share", digits=3), ".949 ± .003"),
        (Figure(value=0.482, form="share", digits=3, flagged=True), "⚠ .482"),
        (Figure(value=0, low=0, high=0.07, interval="extremes", form="share"), "0 [0, .07]"),
    ],
)  # fmt: skip
def test_a_figure_is_shown_with_its_unit_and_its_spread(figure, text):
    assert str(figure) == text


def test_a_figure_measured_again_is_held_to_interval_else_two_deviations_else_digits():
    interval = Figure(value=2, low=1.5, high=2.5, interval="quartiles")
    deviation, digits = Figure(value=2, sd=0.1), Figure(value=2, digits=1)

    assert [is_within(x, interval) for x in (1.5, 2.5, 2.6)] == [True, True, False]
    assert [is_within(x, interval) for x in (1.496, 2.504, 2.506)] == [True, True, False]
    assert [is_within(x, deviation) for x in (1.85, 2.15, 2.25)] == [True, True, False]
    assert [is_within(x, digits) for x in (1.96, 2.04, 2.06)] == [True, True, False]


def test_a_path_finds_one_entry_of_a_list():
    entries = [{"name": "pgd", "eps": n / 255, "accuracy": n / 10} for n in (2, 4)]

    assert look_up({"attacks": entries}, "attacks[name=pgd,eps=4/255]accuracy %") == 40


def test_a_path_takes_the_mean_or_the_median_of_all_entries_that_fit():
    cells = [
        {"point": {"mode": mode, "world": 2}, "attacks": [{"name": "pgd", "accuracy": accuracy}]}
        for mode, accuracy in (("plain", 0.1), ("fused", 0.2), ("fused", 0.3), ("fused", 0.7))
    ]
    path = "cells[point.mode=fused,point.world=2]attacks[name=pgd]accuracy"

    assert look_up({"cells": cells}, f"mean {path}") == pytest.approx(0.4)
    assert look_up({"cells": cells}, f"median {path} %") == pytest.approx(30)
    assert look_up({"cells": cells}, path) == 0.2


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_the_links_of_a_readme_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path

        assert target.exists(), link
        if heading:
            assert heading in _anchors(target.read_text(encoding="utf-8")), link


def test_the_picture_is_drawn_from_its_record():
    assert drawn_from() == sources()


def test_the_first_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
