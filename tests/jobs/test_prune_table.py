"""The table of prunings: each cell once, in one MLflow run, or a mistake in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from torch import nn

from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier, save_classifier


@pytest.fixture
def network(network: Path) -> Path:
    """The network with norms that are not zero: timm begins with some that are."""
    model = load_classifier(network)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    save_classifier(network.with_name("passing"), model, read_card(network))
    return network.with_name("passing")


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_every_cell_is_pruned_once_and_the_same_command_runs_none_again(
    spark, load_job, network: Path, write_shards: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    store, output = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "result.json"
    argv = [
        *("--models.tiny", str(network), "--shards", str(write_shards(rows=16, side=32))),
        *("--methods", "magnitude,rsr", "--sparsities", "0,0.5", "--folder", str(tmp_path / "t")),
        *("--train.epochs", "1", "--train.batch_size", "8", "--train.validation_steps", "1"),
        *("--train.monitor.action", "off", "--evaluate.steps", "1", "--evaluate.sanity_images"),
        *("2", "--launch.processes", "1", "--track.uri", store, "--output", str(output)),
        *("--track.system_metrics", "false", "--track.log_model", "false"),
    ]

    assert load_job("prune_table").main(argv) == 0

    cells = json.loads(output.read_text())["cells"]
    done = [(each["method"], each["sparsity"], each["status"]) for each in cells]
    assert done == [
        ("magnitude", 0.0, "finished"),
        ("magnitude", 0.5, "finished"),
        ("rsr", 0.5, "finished"),
    ]
    assert [each["zeros"] for each in cells] == pytest.approx([0, 0.5, 0.5], abs=1e-3)
    assert all((Path(each["network"]) / "model.safetensors").is_file() for each in cells)
    assert [each["noise_worst"] is None for each in cells] == [True, True, False]
    assert "| tiny | 50 | rsr |" in capsys.readouterr().out
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "t" / "networks").rglob("*.safetensors")}
    assert len(kept) == 3
    assert load_job("prune_table").main(argv) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    parent = json.loads(output.read_text())["mlflow"]["run_id"]
    runs = MlflowClient(store).search_runs(["1"], f"tags.mlflow.parentRunId = '{parent}'")
    assert len(runs) == 3


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--shards {shards}", "models is needed"),
        ("--models.x /nowhere --shards {shards}", "'/nowhere' is not a medspark model"),
        ("--models.x {model} --shards {shards} --sparsities 0.5,1", "sparsities.1 cannot be"),
        ("--models.x {model} --shards {shards} --methods snip", "methods.0 cannot be 'snip'"),
        ("--models.x {model} --shards {shards} --prune.structured true", "structured removes"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    load_job, network: Path, write_shards, argv: str, sentence: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = write_shards(rows=8, side=32)

    status = load_job("prune_table").main(argv.format(model=network, shards=shards).split())

    assert status == 2
    assert sentence in capsys.readouterr().err
