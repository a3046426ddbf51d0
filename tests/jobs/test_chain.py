"""Train, distil, prune, export: one command each, and one lineage in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from medspark.models.card import read_card
from medspark.models.checkpoint import load_classifier
from medspark.models.masks import prunable, zero_share

TRAINING = [
    *("--train.epochs", "1", "--train.batch_size", "8", "--train.validation_steps", "1"),
    *("--train.inner_steps", "1", "--train.monitor.action", "off", "--evaluate.steps", "1"),
    *("--evaluate.sanity_images", "0", "--launch.processes", "1"),
]
EXPORT = ["--precision=int8", "--eps=2/255", "--steps=1", "--queries=2", "--images=8"]
EXPORT += ["--bootstrap=2", "--latency_images=2", "--track.log_model=false"]


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_a_tiny_network_is_trained_distilled_pruned_and_exported_in_one_lineage(
    spark, load_job, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    store, shards = f"sqlite:///{tmp_path / 'mlflow.db'}", str(write_shards(rows=16, side=32))

    def run(job: str, *more: str) -> dict[str, Any]:
        output = tmp_path / f"{job}.json"
        status = load_job(job).main(
            [
                *("--shards", shards, "--output", str(output), "--track.uri", store),
                *("--track.system_metrics", "false"),
                *more,
            ]
        )
        assert status == 0
        return dict(json.loads(output.read_text()))

    def parent(result: dict[str, Any], name: str) -> str:
        tags = MlflowClient(store).get_run(result["mlflow"]["run_id"]).data.tags
        return str(tags[f"medspark.from_{name}"])

    large = run("train_at", *TRAINING, "--model.name", "resnet10t")
    small = run(
        "distill",
        *(*TRAINING, "--model.name", "test_resnet", "--distill.method", "rslad"),
        *("--distill.teacher", large["model"]),
    )
    sparse = run("prune", *TRAINING, "--model", small["model"], "--sparsity", "0.5")

    assert parent(small, "teacher") == large["mlflow"]["run_id"]
    assert parent(sparse, "model") == small["mlflow"]["run_id"]
    assert sparse["sparsity"] == zero_share(prunable(load_classifier(Path(sparse["model"]))))
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        pytest.skip("exports need onnx and onnxruntime: pip install medspark[edge]")
    exports = ["--model", sparse["model"], "--folder", str(tmp_path / "exports")]
    exported = run("export_edge", *exports, *EXPORT, "--backend=onnxruntime")
    assert parent(exported, "model") == sparse["mlflow"]["run_id"]
    card = read_card(Path(exported["artifacts"][0]["path"]), kinds=("onnx",))
    assert card.pruning == read_card(Path(sparse["model"])).pruning
