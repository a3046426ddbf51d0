"""The table of prunings: rows, means, flags, failures, the figure."""

from __future__ import annotations

import csv
import io

from medspark.evaluate.sanity import SIGN, Flag
from medspark.study.prune_report import PruneCell, csv_text, markdown, prune_figure, rows

FLAG = Flag(name="unsteady", triggered=True, value=1.0, threshold=0.1, sentence="answers change")


def cell(method: str = "rsr", sparsity: float = 0.85, seed: int = 0, **figures) -> PruneCell:
    status = figures.pop("status", "finished")
    return PruneCell(
        model="a", method=method, sparsity=sparsity, seed=seed, status=status, **figures
    )


def line(text: str, start: str) -> list[str]:
    found = next(each for each in text.splitlines() if each.startswith(start))
    return [part.strip() for part in found.strip("|").split("|")]


def test_a_row_is_the_mean_of_its_seeds_from_lowest_to_highest() -> None:
    cells = [cell(seed=1, worst=0.7), cell("hydra", worst=0.1), cell(seed=0, worst=0.5)]

    text = markdown(cells, facts={})

    assert [[c.seed for c in row] for row in rows(cells)] == [[0, 1], [0]]
    assert line(text, "| a | 85 | rsr")[6] == "60.0 (50.0–70.0)"
    assert line(text, "| a | 85 | hydra")[6] == "10.0"


def test_fine_tuning_without_pruning_is_called_so() -> None:
    text = markdown([cell("magnitude", 0.0, clean=0.9)], facts={"command": "x"})

    assert line(text, "| a | 0 |")[2:5] == ["none", "–", "90.0"]
    assert "- command: x" in text


def test_a_flag_marks_what_was_measured_under_attack_and_gives_its_reason() -> None:
    text = markdown([cell(clean=0.9, worst=0.5, flags=(FLAG,))], facts={})

    found = line(text, "| a | 85 | rsr")
    assert (found[4], found[6]) == ("90.0", f"{SIGN} 50.0")
    assert "answers change" in text


def test_failed_and_pending_cells_say_so() -> None:
    cells = [cell(status="failed", failure="no memory"), cell("lasso", status="pending")]

    text = markdown(cells, facts={})

    assert line(text, "| a | 85 | rsr")[3] == "failed"
    assert line(text, "| a | 85 | lasso")[3] == "not run"
    assert "no memory" in text


def test_every_cell_is_a_line_of_csv() -> None:
    cells = [cell(worst=0.5, flags=(FLAG,)), cell("noise", masked=0.4)]

    read = list(csv.DictReader(io.StringIO(csv_text(cells))))

    assert [(r["method"], r["worst"], r["masked"]) for r in read] == [
        ("rsr", "0.5", ""),
        ("noise", "", "0.4"),
    ]
    assert read[0]["flags"] == "answers change"


def test_the_figure_draws_a_line_for_each_method_and_hollow_points_for_flags() -> None:
    dense = cell("magnitude", 0.0, worst=0.8)
    cells = [dense, cell(worst=0.5, flags=(FLAG,)), cell(sparsity=0.9, worst=0.4)]

    (axes,) = prune_figure(cells).axes

    lines = {each.get_label(): each for each in axes.lines if each.get_label()[0] != "_"}
    assert list(lines["rsr"].get_ydata()) == [50.0, 40.0]
    points = [each for each in axes.lines if each.get_marker() == "o"]
    assert [p.get_markerfacecolor() == "none" for p in points] == [False, True, False]


def test_a_line_runs_from_low_to_high_sparsity_in_whatever_order_the_cells_are() -> None:
    cells = [cell(sparsity=0.85, worst=0.5), cell(sparsity=0.95, worst=0.3),
             cell(sparsity=0.5, worst=0.6)]  # fmt: skip

    (axes,) = prune_figure(cells).axes

    drawn = next(each for each in axes.lines if each.get_label() == "rsr")
    assert list(drawn.get_xdata()) == [50.0, 85.0, 95.0]
    assert list(drawn.get_ydata()) == [60.0, 50.0, 30.0]
