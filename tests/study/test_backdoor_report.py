"""The backdoor table says what was measured, with its spread, flags and failures."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.sanity import SIGN, SIGN_MEANS, Flag
from medspark.study.backdoor_figure import ablation_figure, success_figure
from medspark.study.backdoor_report import (
    COLUMNS,
    BackdoorCell,
    Point,
    csv_text,
    differs,
    markdown,
    page,
    rows,
)

SHARES = st.floats(0, 1)
TITLES = ["main accuracy", "worst case", "success", "success later", "TPR", "FPR", "aggregation, s"]


def flag(name: str, sentence: str) -> Flag:
    return Flag(name=name, triggered=True, value=1, threshold=0, sentence=sentence)


def cell(adversary: str = "projected", rule: str = "krum", seed: int = 0, **figures: Any):
    usual = {"main": 0.9, "worst": 0.4, "success": 0.75, "lasting": 0.5, "aggregation_seconds": 0.2}
    about = {"adversary": adversary, "rule": rule, "seed": seed, "status": "finished"}
    return BackdoorCell(**(about | usual | figures))


def text(*cells: BackdoorCell) -> str:
    return markdown({"T": cells}, later=10, averaged=3, title="Table", facts={"seeds": "0"})


def line(*cells: BackdoorCell, number: int = 0) -> list[str]:
    """Return the entries of a row of the Markdown table."""
    found = [row for row in text(*cells).splitlines() if row.startswith("|")]
    return [entry.strip() for entry in found[2 + number].strip("|").split("|")]


def test_a_row_shows_every_figure_of_its_cell():
    assert line(cell(tpr=1.0, fpr=0.125)) == [
        *("projected", "krum", "90.0", "40.0", "75.0", "50.0", "100.0", "12.5", "0.200")
    ]


def test_the_columns_are_those_of_the_field():
    assert [column.title for column in COLUMNS] == TITLES


def test_a_rule_that_detects_nobody_has_no_rates():
    assert line(cell())[-3:-1] == ["–", "–"]


@given(st.lists(SHARES, min_size=2, max_size=5))
def test_seeds_are_one_row_with_mean_and_extremes(values: list[float]):
    cells = [cell(seed=n, main=value) for n, value in enumerate(values)]

    assert len(rows(cells)) == 1
    mean, low, high = sum(values) / len(values), min(values), max(values)
    assert line(*cells)[2] == f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def test_a_flag_of_the_attack_marks_the_worst_case_alone():
    hidden = flag("zero_gradients", "gradients are hidden")

    entries = line(cell(flags=(hidden,)))

    assert [SIGN in entry for entry in entries[2:]] == [False, True, *[False] * 5]
    assert "[1] Flagged, do not trust: gradients are hidden." in text(cell(flags=(hidden,)))
    assert SIGN_MEANS in text(cell(flags=(hidden,)))


def test_no_worst_case_can_be_worse_than_zero():
    assert SIGN not in line(cell(worst=0.0, flags=(flag("zero_gradients", "hidden"),)))[3]


def test_one_answer_for_all_marks_success_too():
    entries = line(cell(flags=(flag("same_class_for_all", "one class"),)))

    assert [SIGN in entry for entry in entries[2:]] == [*[True] * 4, *[False] * 3]


def test_a_failed_cell_says_why_and_a_pending_one_that_it_did_not_run():
    blank = {"main": None, "worst": None, "success": None, "lasting": None}
    failed = cell(status="failed", failure="too few clients", aggregation_seconds=None, **blank)

    assert "[1] Failed: too few clients" in text(failed)
    assert set(line(failed)[2:]) == {"failed [1]"}
    pending = cell(status="pending", aggregation_seconds=None, **blank)
    assert set(line(pending)[2:]) == {"not run"}


def test_the_share_of_honest_clients_with_tail_images_is_a_column_of_the_ablation():
    cells = [cell(honest_edge=share) for share in (0.0, 0.25)]

    assert line(*cells, number=1)[:3] == ["projected", "krum", "25.0"]
    assert "honest with tail" not in text(cell())


def test_the_page_holds_what_the_table_holds_and_escapes_it():
    found = page(
        {"a<b": [cell()]},
        later=3,
        averaged=1,
        title="T",
        facts={"command": "x <y>"},
        pictures=["p"],
    )

    assert "<td>75.0</td>" in found
    assert "a&lt;b" in found
    assert "x &lt;y&gt;" in found
    assert "3 rounds after the attack stopped" in found


def test_every_cell_is_a_line_of_the_csv_file():
    found = list(csv.DictReader(io.StringIO(csv_text([cell(), cell(seed=1, success=None)]))))

    assert [row["success"] for row in found] == ["0.75", ""]
    assert [row["seed"] for row in found] == ["0", "1"]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"success": 0.02, "lasting": 0.0, "main": 0.89}, False),
        ({"success": 0.2, "lasting": 0.0, "main": 0.89}, True),
        ({"success": None, "lasting": None, "main": 0.5}, True),
        ({"success": None, "lasting": None, "main": None}, True),
    ],
)
def test_a_row_differs_if_the_attack_moves_accuracy_or_succeeds(figures: Any, expected: bool):
    calm = [cell("none", main=0.9, success=0.08, lasting=0.05), cell("none", "fedavg", main=0.4)]

    assert differs(cell(**figures), calm, margin=0.1) is expected


def test_a_row_without_an_attack_or_without_a_comparison_is_run_with_every_seed():
    assert differs(cell("none"), [], margin=0.1)
    assert differs(cell(success=0.0, lasting=0.0), [], margin=0.1)


def test_success_is_drawn_over_the_rounds_for_adversaries_that_have_one():
    curve = tuple(Point(round=n, success=n / 4) for n in range(4))
    cells = [cell(curve=curve), cell(rule="rfa", curve=curve), cell("ipm", curve=(Point(round=0),))]

    (axes,) = success_figure(cells, stopped=2).axes

    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_title() == "projected"
    assert list(lines["rfa"].get_xdata()) == [1, 2, 3, 4]
    assert list(lines["rfa"].get_ydata()) == [0, 25, 50, 75]


def test_the_ablation_draws_success_against_the_share_that_holds_tail_images():
    cells = [
        cell(honest_edge=share, seed=seed, success=(1 - share) * (1 - seed / 2))
        for share in (0.5, 0.0)
        for seed in (0, 1)
    ]

    line = ablation_figure(cells).axes[0].lines[0]

    assert list(line.get_xdata()) == [0, 50]
    assert list(line.get_ydata()) == [75, 37.5]
