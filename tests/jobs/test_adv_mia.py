"""Adv_MIA's protocol, conf/jobs/adv_mia.yaml, as a configuration of the paper's table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medspark.config import load_config
from medspark.workflows.paper_plan import PaperTableConfig, check

PROTOCOL = str(Path(__file__).parents[2] / "conf" / "jobs" / "adv_mia.yaml")
ATTACKS = ("pgd", "cw", "square", "autoattack")


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_the_protocol_attacks_three_trainings_at_four_budgets_with_a_column_for_each_attack(
    spark, load_job, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    argv = [
        *("--config", PROTOCOL, "--datasets.x", str(write_shards(rows=8, side=16))),
        *("--models", "test_resnet", "--train.epochs", "1", "--train.inner_steps", "2"),
        *("--evaluate.images", "2", "--evaluate.steps", "2", "--evaluate.queries", "20"),
        *("--evaluate.sanity_images", "0", "--evaluate.bootstrap", "0", "--evaluate.gallery", "0"),
        *("--train.monitor.action", "off", "--launch.processes", "1"),
        *("--folder", str(tmp_path / "work"), "--output", str(tmp_path / "result.json")),
        *("--track.uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--track.system_metrics", "false"),
    ]

    assert load_job("paper_table").main(argv) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    assert [cell["training"] for cell in result["cells"]] == ["original", "pgd", "trades"]
    for cell in result["cells"]:
        trained = tmp_path / "work" / "networks"
        assert len(list(trained.glob("*/trained.json"))) == 3
        attacked = {(f["attack"], round(255 * f["eps"], 6)) for f in cell["figures"]}
        assert {(name, eps) for name in ATTACKS for eps in (1, 2, 4, 8)} < attacked
    modes = [json.loads(p.read_text())["mode"] for p in trained.glob("*/trained.json")]
    assert sorted(modes) == ["pgd", "standard", "trades"]
    head = "| FGSM 8/255 | PGD 8/255 | C&W 8/255 | Square 8/255 | AutoAttack 8/255 | worst case"
    text = Path(result["table"]).read_text()
    assert head in text
    assert "pgd: 2 steps, at " in text
    with Path(result["csv"]).open() as file:
        assert {"pgd", "trades"} < {row["training"] for row in csv.DictReader(file)}


def test_its_networks_and_attacks_are_known(write_shards, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config", PROTOCOL, "--datasets.x", str(write_shards(side=64))]

    config = load_config(PaperTableConfig, argv)

    check(config)
    assert config.trainings == ("original", "pgd", "trades")
    assert (config.evaluate.steps, len(config.models)) == (20, 3)
