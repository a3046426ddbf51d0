"""The table says what was found: means, intervals, flags and failures, and nothing is lost."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.result import Figure
from medspark.evaluate.sanity import HOLLOW_MEANS, SIGN_MEANS, Flag
from medspark.study.paper_figure import paper_figure
from medspark.study.paper_report import (
    Column,
    TableCell,
    columns,
    csv_text,
    entry,
    markdown,
    rows,
)

SHOWN = columns([2 / 255])
HIDDEN = Flag(
    name="zero_gradients", triggered=True, value=1, threshold=0, sentence="gradients are hidden"
)
SHARES = st.floats(0, 1)


def cell(**changes: object) -> TableCell:
    about = {"dataset": "cxr", "train_images": 100, "model": "m", "training": "original"}
    return TableCell(**(about | {"weights": "random", "seed": 0} | changes))


def figures(clean: float, fgsm: float, worst: float) -> tuple[Figure, ...]:
    values = [("clean", 0.0, clean), ("fgsm", 2 / 255, fgsm), ("worst_case", 2 / 255, worst)]
    return tuple(
        Figure(attack=name, eps=eps, metric="accuracy", value=v, low=v - 0.125, high=v + 0.125)
        for name, eps, v in values
    )


def text(cells: list[TableCell]) -> str:
    return markdown(cells, SHOWN, metric="accuracy", title="T", facts={"seeds": "0"})


def line(cells: list[TableCell], number: int = 0) -> str:
    """Return a row of figures of the Markdown table."""
    return [row for row in text(cells).splitlines() if row.startswith("|")][2 + number]


def test_every_figure_comes_with_its_interval():
    assert "| 75.0 (62.5–87.5) | 50.0 (37.5–62.5) | 25.0 (12.5–37.5) |" in line(
        [cell(figures=figures(0.75, 0.5, 0.25))]
    )


def test_the_columns_are_clean_and_then_fgsm_and_worst_case_of_every_budget():
    titles = [column.title for column in columns([4 / 255, 1.5 / 255, 4 / 255])]

    assert titles == [
        *("clean", "FGSM 1.5/255", "worst case 1.5/255", "FGSM 4/255", "worst case 4/255"),
    ]


def test_transfer_has_a_column_where_it_is_among_the_attacks():
    titles = [column.title for column in columns([2 / 255], attacks=["transfer", "pgd", "fgsm"])]

    assert titles == ["clean", "FGSM 2/255", "transfer 2/255", "worst case 2/255"]


@given(st.lists(SHARES, min_size=1, max_size=5))
def test_seeds_are_one_row_whose_mean_lies_within_the_span_of_their_intervals(values):
    cells = [cell(seed=n, figures=figures(v, v, v)) for n, v in enumerate(values)]

    found = entry(cells, Column("clean"), "accuracy")

    assert len(rows(cells)) == 1
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= min(values) <= found.mean + 1e-12
    assert found.mean - 1e-12 <= max(values) <= found.high
    assert (found.sd is None) == (len(values) == 1)


def test_several_seeds_show_mean_and_spread():
    cells = [cell(seed=n, figures=figures(v, v, v)) for n, v in enumerate((0.5, 0.75))]

    assert "| 62.5 ± 17.7 (37.5–87.5) |" in line(cells)
    assert "2 seeds" in text(cells)


def test_a_flagged_figure_is_marked_with_its_reason_where_it_can_be_wrong():
    flagged = cell(figures=figures(0.75, 0.5, 0.0), flags=(HIDDEN,))

    clean, fgsm, worst = line([flagged]).split(" | ")[-3:]

    assert fgsm == "⚠ 50.0 (37.5–62.5) [1]"
    assert "⚠" not in clean + worst  # nobody can do worse than 0
    assert "[1] **Flagged, do not trust**: gradients are hidden." in text([flagged])
    assert SIGN_MEANS in text([flagged])
    assert SIGN_MEANS not in text([cell(figures=figures(0.75, 0.5, 0.0))])


def test_a_network_that_answers_the_same_to_all_is_marked_in_the_clean_column_too():
    dead = HIDDEN.model_copy(update={"name": "same_class_for_all"})

    clean, *_ = line([cell(figures=figures(0.75, 0.5, 0.0), flags=(dead,))]).split(" | ")[-3:]

    assert clean.startswith("⚠ 75.0")


def test_a_failed_cell_says_why_and_one_to_come_that_it_has_not_run():
    cells = [cell(failure="rank 0 died"), cell(training="adversarial")]

    assert line(cells, 0).count("failed [1]") == 3
    assert line(cells, 1).count("not run") == 3
    assert "[1] Failed: rank 0 died" in text(cells)


def test_a_row_of_which_one_seed_failed_shows_the_others_and_says_so():
    cells = [cell(figures=figures(0.5, 0.5, 0.5)), cell(seed=1, failure="rank 0 died")]

    assert "50.0 (37.5–62.5) (some seeds failed [1])" in line(cells)


def test_rows_keep_the_order_of_the_cells_and_lose_none():
    names = [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]
    cells = [cell(dataset=d, model=m, seed=s) for s in (1, 0) for d, m in names]

    found = rows(cells)

    assert [(row.first.dataset, row.first.model) for row in found] == names
    assert [c.seed for row in found for c in row.cells] == [0, 1] * 4


def test_the_csv_holds_every_figure_and_a_line_for_what_has_none():
    cells = [
        cell(figures=figures(0.75, 0.5, 0.25), flags=(HIDDEN,)),
        cell(training="adversarial", failure="died, they say"),
    ]

    found = list(csv.DictReader(io.StringIO(csv_text(cells))))

    assert [row["value"] for row in found] == ["0.75", "0.5", "0.25", ""]
    assert [row["believable"] for row in found] == ["True", "False", "False", ""]
    assert found[3]["failure"] == "died, they say"


def test_the_picture_has_a_panel_for_each_dataset_and_network_and_what_is_flagged_is_hollow():
    cells = [
        cell(figures=figures(0.75, 0.5, 0.25), flags=(HIDDEN,)),
        cell(dataset="cells", model="n"),
    ]

    figure = paper_figure(cells, SHOWN)

    hollow = [bar for bar in figure.axes[0].patches if bar.get_facecolor()[3] == 0]
    assert [axes.get_title() for axes in figure.axes] == [
        "m, cxr", "n, cxr", "m, cells", "n, cells",
    ]  # fmt: skip
    assert len(hollow) == 2
    assert figure.get_supxlabel() == HOLLOW_MEANS
