"""A sweep goes on with the cells of an earlier version of medspark."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medspark import __version__
from medspark.shards.manifest import read_manifest
from medspark.study.cells import Cell
from medspark.study.sweep import ScaleCell
from medspark.workflows import scale_at as scaling
from medspark.workflows.scale_grid import ScaleAtConfig, cells_of, training_of

DEAD = {"name": "same_class_for_all", "value": 1.0, "threshold": 0.99, "sentence": "it is dead"}


def name_before(config: ScaleAtConfig) -> str:
    """Return what an earlier version called the folder of the first cell."""
    assert config.shards is not None
    training = training_of(config, cells_of(config, 1)[0])
    evaluate = training.evaluate.model_copy(update={"sanity_images": 0})
    parts = {"model", "attack", "train", "data", "evaluate", "seed", "launch"}
    decisive = training.model_copy(update={"evaluate": evaluate}).model_dump(
        mode="json", include=parts
    ) | {"dataset": read_manifest(config.shards).digest, "version": __version__}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture
def first(write_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that keeps the first cell as before and returns it as it is found."""
    monkeypatch.setattr(scaling, "_room", lambda *_: (2, 1))
    config = ScaleAtConfig.model_validate(
        {
            "shards": write_shards(), "folder": tmp_path / "sweep",
            "grid": {"plain": False, "mode": ["fused"]}, "model": {"name": "net"},
        }
    )  # fmt: skip
    point = cells_of(config, 1)[0].model_dump()
    name = name_before(config)
    folder = config.place / "cells" / name

    def found(flags: list[dict[str, Any]] | None) -> Cell[ScaleCell]:
        (folder / "report").mkdir(parents=True)
        kept = {"cell": point, "fingerprint": name, "status": "finished", "error": "",
                "oversubscribed": False, "images_per_second": 7.0, "clean_auroc": 0.8}  # fmt: skip
        (folder / "measured.json").write_text(json.dumps(kept))
        if flags is not None:
            (folder / "report" / "result.json").write_text(
                json.dumps({"images": 1, "clean": {}, "flags": flags})
            )
        sweeper = scaling._Sweeper(config, None)  # type: ignore[arg-type]
        return sweeper._cell(cells_of(config, 1)[0])

    return found


def test_a_finished_cell_is_found_with_the_flags_of_its_report(first: Any) -> None:
    kept = first([DEAD | {"triggered": True}, DEAD | {"triggered": False}]).kept()

    assert kept is not None
    assert (kept.images_per_second, kept.clean_auroc) == (7.0, 0.8)
    assert [flag.sentence for flag in kept.flags] == ["it is dead"]


def test_a_cell_without_a_report_is_found_too(first: Any) -> None:
    kept = first(None).kept()

    assert kept is not None
    assert not kept.flagged
