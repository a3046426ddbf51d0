"""A table goes on with the cells of an earlier version of medspark."""

from __future__ import annotations

import json
from pathlib import Path

from medspark.workflows.paper_plan import PaperTableConfig, digest, fingerprint
from medspark.workflows.paper_table import _Table


def test_a_cell_of_an_earlier_version_is_kept_with_its_budget_as_a_fraction(
    write_shards, tmp_path: Path
) -> None:
    table = PaperTableConfig.model_validate(
        {"datasets": {"cxr": write_shards()}, "folder": tmp_path, "evaluate": {"eps": ["2/255"]}}
    )
    found = _Table(table, None, "")  # type: ignore[arg-type]  # only synthetic data need Spark
    network = found._networks[0]
    write_before(table, fingerprint(table, network), found._blank(network).model_dump(mode="json"))

    kept = found._kept(network)

    assert kept is not None
    assert [(figure.eps, figure.value) for figure in kept.figures] == [(2 / 255, 0.5)]


def write_before(table: PaperTableConfig, network: str, blank: dict[str, object]) -> None:
    """Keep a cell as versions did that counted a budget in grey levels of 255."""
    evaluate = table.evaluate.model_dump(mode="json") | {"eps": [2.0]}
    figure = {"attack": "pgd", "eps_255": 2.0, "metric": "accuracy", "value": 0.5}
    place = table.folder / "cells" / f"{digest({'network': network, 'evaluate': evaluate})}.json"
    place.parent.mkdir()
    place.write_text(json.dumps(blank | {"figures": [figure]}))
