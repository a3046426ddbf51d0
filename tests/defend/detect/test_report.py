"""The report shows no oblivious figure of a detector without the adaptive one beside it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from small_world import EPS, World

from medspark.defend.detect.figures import false_positives
from medspark.defend.detect.report import matrix, metrics, sentences, table, write_detection_report
from medspark.defend.detect.result import Chosen, DetectResult, NotAttacked
from medspark.evaluate.sanity import Flag


@pytest.fixture(scope="module")
def result(world: World) -> DetectResult:
    scores = world.scores()
    chosen = world.detectors[world.choice.chosen]
    flag = Flag(
        name=f"{world.choice.targets[0].key}: f",
        triggered=True,
        value=1,
        threshold=0,
        sentence="it is <wrong>",
    )
    return DetectResult(
        model="a|b", dataset_digest="d", norm="linf", images=64,
        detectors=tuple(scores.figures()),
        chosen=Chosen(name=chosen.name, layer=chosen.layer, auroc=0.9, best_single="kde on logits"),
        guard="g", action="flag",
        false_positives=false_positives(
            np.zeros(64, bool), asked=0.05, patients=np.arange(64), labels=np.zeros(64),
            classes=("a", "b"), sites=np.array(["x"] * 64),
        ),
        accuracy=0.9, accuracy_with_guard=0.85,
        undetected_without_guard={"38/255": float(scores.wrong_under(EPS).mean())},
        surrogates={}, believable=False, flags=(flag,), report="r", mlflow={},
    )  # fmt: skip


def test_each_row_has_the_adaptive_figures_beside_the_oblivious_ones(result: DetectResult) -> None:
    head, *rows = table(result.detectors, result.triggered_flags)

    oblivious, adaptive = head.index("AUROC"), head.index("adaptive AUROC")
    assert len(rows) == 2 * 4  # attacks x targets
    for row in rows:
        assert re.fullmatch(r"0\.\d{3}", row[oblivious])
        assert re.fullmatch(r"(≤ )?0\.\d{3}", row[adaptive])


def test_each_cell_of_the_matrix_has_both_and_marks_bounds(result, world: World) -> None:
    (_, *names), *rows = matrix(result)
    targets = {target.key for target in world.choice.targets}

    cells = {
        f"{name}:{layer}": cell
        for layer, *row in rows
        for name, cell in zip(names, row, strict=True)
        if cell
    }
    assert len(cells) == len(world.detectors)
    for key, cell in cells.items():
        assert re.fullmatch(r"\d\.\d{3} / (≤ )?\d\.\d{3}", cell)
        assert ("≤" in cell) == (key not in targets)


def test_an_oblivious_metric_has_an_adaptive_one_beside_it(result: DetectResult) -> None:
    found = metrics(result)

    own = [name for name in found if name.endswith("/auroc") and "/adaptive/" not in name]
    assert own
    for name in own:
        assert name.replace("/auroc", "/adaptive/auroc") in found


def test_pages_escape_names_and_begin_with_what_the_figures_mean(result, tmp_path: Path) -> None:
    write_detection_report(tmp_path, result, facts={"model": "<b>"})

    page = (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.md").read_text()
    assert "<b>" not in page
    assert "it is &lt;wrong&gt;" in page
    for sentence in sentences(result)[:2]:
        assert sentence in page
    assert "without a guard" in text
    assert "a\\|b" in text


def test_a_detector_that_was_not_attacked_is_named_with_the_reason(result: DetectResult) -> None:
    first = next(each for each in result.detectors if not isinstance(each.adaptive, NotAttacked))
    adaptive = NotAttacked(reason="no time", upper_bound=first.adaptive)
    changed = result.model_copy(
        update={"detectors": (first.model_copy(update={"adaptive": adaptive}),)}
    )

    assert f"{first.name} on {first.layer} was not attacked: no time." in sentences(changed)
    assert table(changed.detectors, changed.triggered_flags)[1][8].startswith("≤")


def test_the_rows_of_a_flagged_detector_are_marked_and_no_others(result, world: World) -> None:
    marked = {
        f"{row[0].removeprefix('⚠ ')}:{row[1]}"
        for row in table(result.detectors, result.triggered_flags)
        if "⚠" in row[0]
    }

    assert marked == {world.choice.targets[0].key}
