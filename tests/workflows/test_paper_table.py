"""A table goes on with the cells of an earlier version of medspark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medspark.study.cells import digest
from medspark.workflows.paper_plan import PaperTableConfig, fingerprint, networks
from medspark.workflows.paper_table import _Table


def test_a_cell_of_an_earlier_version_is_kept_with_its_budget_as_a_fraction(
    write_shards, tmp_path: Path
) -> None:
    table = PaperTableConfig.model_validate(
        {"datasets": {"cxr": write_shards()}, "folder": tmp_path, "evaluate": {"eps": ["2/255"]}}
    )
    found = _Table(table, None)  # type: ignore[arg-type]  # only synthetic data need Spark
    network = next(networks(table, found._datasets))
    write_before(table, fingerprint(table, network))

    kept = found.cells[0].kept()

    assert kept is not None
    assert [(figure.eps, figure.value) for figure in kept.figures] == [(2 / 255, 0.5)]
    assert [flag.sentence for flag in kept.flags] == ["gradients are hidden"]
    assert (kept.dataset, kept.seconds) == ("cxr", 5.0)


@pytest.mark.parametrize("changes", [{"failure": "rank 0 died"}, {"figures": []}])
def test_a_cell_that_failed_in_an_earlier_version_is_not_kept(
    write_shards, tmp_path: Path, changes: dict[str, object]
) -> None:
    table = PaperTableConfig.model_validate(
        {"datasets": {"cxr": write_shards()}, "folder": tmp_path, "evaluate": {"eps": ["2/255"]}}
    )
    found = _Table(table, None)  # type: ignore[arg-type]
    network = next(networks(table, found._datasets))
    write_before(table, fingerprint(table, network), **changes)

    assert found.cells[0].kept() is None


def test_a_cell_that_attacked_the_first_images_is_not_kept_for_drawn_ones(
    write_shards, tmp_path: Path
) -> None:
    evaluate = {"eps": ["2/255"], "images": 5}
    table = PaperTableConfig.model_validate(
        {"datasets": {"cxr": write_shards()}, "folder": tmp_path, "evaluate": evaluate}
    )
    found = _Table(table, None)  # type: ignore[arg-type]
    network = next(networks(table, found._datasets))
    write_before(table, fingerprint(table, network))

    assert found.cells[0].kept() is None


def write_before(table: PaperTableConfig, network: str, **changes: object) -> None:
    """Keep a cell as versions did that counted a budget in grey levels of 255."""
    evaluate = table.evaluate.model_dump(mode="json") | {"eps": [2.0]}
    figure = {"attack": "pgd", "eps_255": 2.0, "metric": "accuracy", "value": 0.5}
    cell = {
        "dataset": "another name", "train_images": 50, "model": "densenet121",
        "training": "original", "weights": "random", "seed": 0, "figures": [figure],
        "doubts": ["gradients are hidden"], "failure": None, "seconds": 5.0,
    }  # fmt: skip
    place = table.folder / "cells" / f"{digest({'network': network, 'evaluate': evaluate})}.json"
    place.parent.mkdir()
    place.write_text(json.dumps(cell | changes))
