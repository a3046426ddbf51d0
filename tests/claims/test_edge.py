"""The comparison of exported models with their torch networks: what is shown, what is missed."""

from __future__ import annotations

from typing import Any

import edge
import pytest


def judged(auroc: float, worst: float, **more: Any) -> dict[str, Any]:
    seen = {"clean": {"auroc": auroc}, "worst_case": [{"accuracy": worst}], "flags": []}
    return seen | more


def artifact(precision: str, auroc: float, worst: float, same: float, far: float) -> dict[str, Any]:
    parity = {"same_answers": same, "largest_difference": far}
    more = {"backend": "openvino", "precision": precision, "bytes": 2_370_000, "parity": parity}
    return judged(auroc, worst, **more)


CELL = {
    "data": "xrays",
    "network": "resnet50",
    "twin": judged(0.95, 0.70),
    "artifacts": [
        artifact("fp32", 0.95, 0.70, 1.0, 3e-6),
        artifact("int8", 0.951, 0.67, 0.985, 0.1),
    ],
}


def test_a_table_shows_int8_beside_its_torch_network_and_what_misses_a_goal():
    shown = edge.table([CELL])

    row = "| xrays | resnet50 | openvino | 0.9500 → 0.9510 | **70.0 → 67.0** | **98.5** | 2.4 | 0 |"
    assert row in shown
    assert "float32 differs by at most 3.0e-06 in probability" in shown


def test_a_better_export_is_as_far_from_its_network_as_a_worse_one():
    better = edge.figures(CELL, artifact("int8", 0.96, 0.75, 1.0, 0.0))

    assert edge.missed(better) == {"auroc", "worst"}


def test_a_distance_that_is_the_goal_itself_does_not_miss_it():
    cell = CELL | {"twin": judged(0.995, 0.835)}
    assert edge.GOALS["worst"] < 0.835 - 0.815, "floating point makes it larger"

    assert edge.missed(edge.figures(cell, artifact("int8", 0.990, 0.815, 0.99, 0.0))) == set()
    assert edge.missed(edge.figures(cell, artifact("int8", 0.989, 0.810, 0.98, 0.0))) == {
        "auroc", "worst", "same",
    }  # fmt: skip


def test_a_network_that_starts_from_weights_asks_for_them(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        edge.arguments(["--networks", "resnet50,mobilenetv2_100"])

    assert "--weights FILE.safetensors" in capsys.readouterr().err
