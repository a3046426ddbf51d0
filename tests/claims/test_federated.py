"""The comparison of federations with central training: equal passes, and no cell done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import federated
import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_all_methods_make_the_same_passes_and_what_is_done_is_not_done_again(
    write_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards, output = write_shards(rows=80, side=32), tmp_path / "table.json"
    command = [
        *("--xrays", str(shards), "--network", "test_resnet", "--passes", "1", "--seeds", "3"),
        *("--images", "4", "--folder", str(tmp_path / "cells"), "--output", str(output)),
    ]

    federated.main(command)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    federated.main(command)

    cells = json.loads(output.read_text())["cells"]
    assert [cell["method"] for cell in cells] == list(federated.METHODS)
    assert len({cell["steps"] for cell in cells if cell["clients"]}) == 1
    assert all(cell["worst_case"][0]["accuracy"] is not None for cell in cells)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")} == kept
    last = capsys.readouterr().out.split("| data |")[-1]
    assert [line.split()[3] for line in last.splitlines()[2:9]] == list(federated.METHODS)


def cell(seed: int, auroc: float, *, bad: bool) -> dict:
    seen = {"auroc": auroc, "accuracy": 0.5}
    return {
        "data": "xrays", "method": "sfat", "seed": seed, "steps": 7, "clean": seen,
        "worst_case": [seen], "attacks": [{"name": "pgd", "steps": 20, "accuracy": 0.25}],
        "flags": [{"triggered": bad, "sentence": "it is dead"}],
    }  # fmt: skip


def test_the_figure_has_a_point_per_network_and_the_flagged_ones_are_hollow():
    drawn = federated.figure([cell(0, 0.9, bad=False), cell(1, 0.8, bad=True)])

    points = [line for line in drawn.axes[0].lines if len(line.get_xdata())]
    assert [point.get_xdata()[0] for point in points] == [90, 80]
    assert [point.get_markerfacecolor() == "none" for point in points] == [False, True]


def test_a_table_shows_mean_and_extremes_and_the_flags_of_each_method():
    shown = federated.table([cell(0, 0.9, bad=False), cell(1, 0.8, bad=True)])

    assert "| xrays | sfat | 2 | 1 | 7 | 0.850 [0.800, 0.900] | 0.500 |" in shown
    assert "⚠ xrays, sfat, seed 1: it is dead" in shown
