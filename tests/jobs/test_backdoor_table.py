"""The backdoor table as a user meets it: one command, resumed by the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from mlflow.tracking import MlflowClient

FEW = (
    "--adversaries none replacement --rules fedavg krum --clients.by dirichlet --clients.count 6 "
    "--clients.per_round 5 --adversary.clients 1,2 --adversary.per_round 1 --warm_up 1 --rounds 1 "
    "--later 1 --local.train.mode standard --local.schedule constant "
    "--model.name test_efficientnet_gn "
    "--evaluate.attacks pgd --evaluate.steps 1 --evaluate.eps 2/255 --evaluate.sanity_images 0 "
    "--ablation.shares 0,0.5 --ablation.adversaries replacement --ablation.rules fedavg"
)


@pytest.mark.spark
@pytest.mark.slow
def test_one_command_fills_table_and_ablation_and_goes_on_where_it_was(
    spark, load_job: Callable[[str], ModuleType], write_shards, tmp_path: Path, capsys
) -> None:
    shards, store = write_shards(rows=24, side=32), f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = (
        f"--shards {shards} --adversary.edge {shards} --folder {tmp_path / 'work'} "
        f"--track.uri {store} --output {tmp_path / 'result.json'} {FEW}"
    ).split()
    job = load_job("backdoor_table")

    assert job.main(words) == 0
    done = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "work" / "cells").joinpath(sorted(_cells(tmp_path))[0]).unlink()
    assert job.main(words) == 0

    again = json.loads((tmp_path / "result.json").read_text())
    timings = {"seconds", "aggregation_seconds"}
    assert [_without(cell, timings) for cell in again["cells"]] == [
        _without(cell, timings) for cell in done["cells"]
    ]
    # The ablation's first share is a cell of the table.
    assert len(done["cells"]) == 5
    assert Path(done["ablation_png"]).is_file()
    assert "## Honest clients that hold tail images" in capsys.readouterr().out
    client = MlflowClient(store)
    parent = done["mlflow"]["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(children) == 5


def _cells(folder: Path) -> list[str]:
    return [path.name for path in (folder / "work" / "cells").glob("*.json")]


def _without(cell: dict[str, object], names: set[str]) -> dict[str, object]:
    return {name: value for name, value in cell.items() if name not in names}
