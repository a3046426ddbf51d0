"""The finalists of a table of prunings: which they are, and how their figures are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pruned
import pytest


def cell(method: str, sparsity: float, worst: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    state = {"status": "finished", "model": "tiny", "clean": 0.9}
    found = {"method": method, "sparsity": sparsity, "worst": worst, "seed": seed}
    return state | {"zeros": sparsity} | found | more


TABLE = [
    cell("magnitude", 0.0, 0.8),
    cell("rsr", 0.85, 0.6),
    cell("rsr", 0.85, 0.62, seed=1),
    cell("magnitude", 0.85, 0.5),
    cell("magnitude", 0.85, 0.5, seed=1),
    cell("hydra", 0.85, 0.7),
    cell("hydra", 0.85, 0.6, seed=1),
    cell("lasso", 0.85, 0.9),
    cell("hydra", 0.95, 0.99),
]


def test_finalists_are_the_dense_network_rsr_and_the_best_rival_with_as_many_seeds():
    found = pruned.finalists(TABLE, 0.85)

    assert list(found) == ["dense", "rsr", "hydra"]
    assert [len(row) for row in found.values()] == [1, 2, 2]


@pytest.mark.parametrize("left", [TABLE[1:], [c for c in TABLE if c["method"] != "rsr"]])
def test_a_table_without_the_dense_network_or_rsr_has_no_finalists(left: list[dict[str, Any]]):
    with pytest.raises(ValueError, match="needs the sparsity 0"):
        pruned.finalists(left, 0.85)


def test_a_table_without_a_rival_of_as_many_seeds_has_no_finalists():
    with pytest.raises(ValueError, match="another method with as many seeds"):
        pruned.finalists(TABLE[:3], 0.85)


def test_a_cell_that_failed_is_named():
    failed = [c if c["method"] != "rsr" else c | {"status": "failed"} for c in TABLE]

    with pytest.raises(ValueError, match="a cell of rsr has not finished"):
        pruned.finalists(failed, 0.85)


def test_a_cell_that_two_tables_have_counts_once():
    again = TABLE[1] | {"worst": 0.61}

    assert pruned.merged([TABLE, [again]]) == [TABLE[0], again, *TABLE[2:]]


def test_a_row_shows_means_from_lowest_to_highest_and_how_many_networks_are_flagged():
    blank = dict.fromkeys(pruned.FIGURES) | {"flags": []}
    judged = [
        blank | {"clean": 0.9, "worst": 0.5},
        blank | {"clean": 0.8, "worst": 0.7, "flags": ["it saturates"]},
    ]

    shown = pruned.table([("tiny", "rsr", judged)])

    assert "| tiny | rsr | 85.0 (80.0–90.0) | – | 60.0 (50.0–70.0) | – | – | – | 1 |" in shown


def test_networks_that_were_judged_are_tabled_and_drawn_without_another_run(tmp_path: Path):
    cells = TABLE[:5]
    (tmp_path / "table.json").write_text(json.dumps({"cells": cells}))
    judged = {
        "images": 8, "clean": {"accuracy": 0.9}, "worst_case": [{"accuracy": 0.5}], "flags": [],
        "attacks": [{"name": "autoattack", "accuracy": 0.5}],
    }  # fmt: skip
    for each in cells:
        name = "-".join(str(each[k]) for k in ("model", "method", "sparsity", "seed"))
        (tmp_path / "judged" / name).mkdir(parents=True)
        (tmp_path / "judged" / name / "result.json").write_text(json.dumps(judged))

    pruned.main(
        [
            *("--tables", str(tmp_path / "table.json"), "--shards", "none"),
            *("--folder", str(tmp_path / "judged"), "--output", str(tmp_path / "out.json")),
            *("--figure", str(tmp_path / "all.png")),
        ]
    )

    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["row"] for row in document["rows"]] == ["dense", "rsr", "magnitude"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
