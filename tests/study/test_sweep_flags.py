"""A network that a sanity check flagged is marked in a sweep's table, figures and sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from medspark.evaluate.sanity import HOLLOW_MEANS, SIGN_MEANS, Flag
from medspark.study.scale_plots import figures_of
from medspark.study.scale_report import compare_sweeps, summary_note, table, write_sweep
from medspark.study.sweep import ScaleCell, ScalePoint, Sweep, curves, prices


def flag(name: str) -> Flag:
    return Flag(name=name, triggered=True, value=1.0, threshold=0.9, sentence=f"seen: {name}")


DEAD = flag("same_class_for_all")
MASKED = flag("fgsm_far_above_margin_pgd")


def cell(
    mode: str = "fused", share: float = 1.0, repeat: int = 0, *flags: Flag, auroc: float = 0.9
) -> ScaleCell:
    point = ScalePoint(
        model="net", mode=mode, data_share=share, scaling="strong", world_size=1,
        threads_per_rank=1, repeat=repeat,
    )  # fmt: skip
    return ScaleCell(
        point=point,
        fingerprint=f"{mode} {share} {repeat}",
        status="finished",
        flags=flags,
        train_images=round(1000 * share),
        images_per_second=100.0,
        clean_auroc=auroc,
        worst_case_accuracy=0.547 if DEAD in flags else 0.3,
    )


def sweep(*cells: ScaleCell, name: str = "s") -> Sweep:
    return Sweep(
        name=name, command="c", hardware="h", dataset="d", dataset_digest="0" * 64,
        cells=list(cells), curves=curves(cells), prices=prices(cells),
    )  # fmt: skip


def hollow(axes: Axes) -> list[float]:
    """Return where on the x axis there are hollow points."""
    return [
        float(line.get_xdata()[0])
        for line in axes.lines
        if line.get_marker() == "o" and line.get_markerfacecolor() == "white"
    ]


def test_a_row_is_marked_if_any_of_its_repeats_is_flagged_and_what_that_means_is_said() -> None:
    found = table(sweep(cell("fused", 1.0, 0), cell("fused", 1.0, 1, DEAD), cell("standard")))

    fused, standard = found.splitlines()[2:4]
    assert fused.startswith("| ⚠ net fused |")
    assert standard.startswith("| net standard |")
    assert SIGN_MEANS in found
    assert "⚠ net fused: same_class_for_all in 1 cell" in found


def test_without_a_flag_nothing_is_marked() -> None:
    honest = sweep(cell("fused"), cell("standard"))

    assert "⚠" not in summary_note(honest)
    for figure in figures_of([honest]).values():
        assert figure.get_supxlabel() == ""
        assert not any(hollow(axes) for axes in figure.axes)


@pytest.mark.parametrize("name", ["throughput", "efficiency", "robustness"])
def test_a_point_of_which_any_repeat_is_flagged_is_hollow_in_every_figure(name: str) -> None:
    cells = [cell("fused", 0.1, 0), cell("fused", 1.0, 0, MASKED), cell("fused", 1.0, 1)]

    figure = figures_of([sweep(*cells)])[name]

    for axes in figure.axes:
        assert hollow(axes) == ([1000.0] if name == "robustness" else [1.0])
    assert figure.get_supxlabel() == HOLLOW_MEANS


def test_a_network_that_answers_the_same_to_all_is_not_said_to_have_gained() -> None:
    cells = [cell("standard", auroc=0.7), cell("fused", 1.0, 0, DEAD, auroc=0.8)]

    assert sweep(*cells).sentences == [
        "net: the cost of fused in clean AUROC is unknown. ⚠ Flagged and left out: 1 of 2 networks."
    ]


def test_a_plain_network_that_is_flagged_is_no_baseline_either() -> None:
    cells = [
        cell("standard", 0.1, 0, DEAD, auroc=0.5), cell("standard", 1.0, auroc=0.9),
        cell("fused", 0.1, auroc=0.6), cell("fused", 1.0, auroc=0.8),
    ]  # fmt: skip

    (price,) = prices(cells)

    assert {n: pytest.approx(v) for n, v in price.by_images.items()} == {1000: [0.1]}
    assert price.sentence.endswith("⚠ Flagged and left out: 1 of 4 networks.")


def test_flags_of_attacks_leave_clean_figures_in_and_are_said() -> None:
    (price,) = prices([cell("standard", 1.0, 0, MASKED), cell("fused", auroc=0.8)])

    assert list(price.by_images) == [1000]
    assert price.sentence.endswith(
        "⚠ Flagged for figures under attack, which this comparison does not use: 1 of 2 networks."
    )


@given(st.sets(st.sampled_from([0, 1, 2]), max_size=3), st.sampled_from(["standard", "fused"]))
def test_only_pairs_of_trusted_networks_are_compared(dead: set[int], mode: str) -> None:
    cells = [
        cell(m, 1.0, repeat, *([DEAD] if repeat in dead and m == mode else []))
        for m in ("standard", "fused")
        for repeat in range(3)
    ]

    (price,) = prices(cells)

    assert sum(map(len, price.by_images.values())) == 3 - len(dead)
    assert price.left_out == len(dead)


def test_the_report_shows_the_figure_behind_each_flag(tmp_path: Path) -> None:
    flagged = sweep(cell("fused", 1.0, 0, DEAD, MASKED), cell("standard"))

    pages = [write_sweep(tmp_path, flagged), compare_sweeps(tmp_path, [flagged, flagged])]

    for page in pages:
        text = page.read_text()
        assert "seen: same_class_for_all" in text
        assert "seen: fgsm_far_above_margin_pgd" in text
        assert "⚠ net fused" in text


def test_a_record_of_an_earlier_version_is_read() -> None:
    kept = cell().model_dump(mode="json", exclude={"flags", "failure"})
    kept["cell"], kept["error"] = kept.pop("point"), ""

    assert ScaleCell.model_validate(kept) == cell()
    assert "flags" not in ScaleCell.model_validate(kept).model_fields_set
