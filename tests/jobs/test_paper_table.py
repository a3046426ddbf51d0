"""The paper's table as a user meets it: cell by cell, and never the same work twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from medspark.errors import RunError
from medspark.workflows import paper_table

Run = Callable[..., int]


@pytest.fixture
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("paper_table")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def run(job: ModuleType, tmp_path: Path, write_shards, store: str) -> Run:
    """Return a function that fills a table of two cells, with further arguments."""
    shards = write_shards(rows=16, shards=2, side=32)

    def started(
        *more: str,
        models: str = "resnet10t",
        trainings: str = "adversarial,robust_distillation",
    ) -> int:
        return job.main(
            [
                *("--datasets.stripes", str(shards), "--models", models),
                *("--trainings", trainings, "--train.epochs", "1"),
                *("--train.inner_steps", "1", "--train.monitor.action", "off"),
                *("--evaluate.steps", "2", "--evaluate.bootstrap", "20", "--evaluate.gallery", "0"),
                *("--folder", str(tmp_path / "work"), "--launch.processes", "1"),
                *("--track.uri", store, "--track.system_metrics", "false"),
                *("--output", str(tmp_path / "result.json"), *more),
            ]
        )

    return started


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_a_failed_cell_is_shown_and_tried_again_and_a_finished_one_is_not(
    spark, run: Run, tmp_path: Path, store: str, monkeypatch, capsys
) -> None:
    trained: list[str] = []
    really = paper_table.train_once

    def train(config: Any, *rest: Any) -> dict[str, Any]:
        trained.append(config.distill.method if config.distill else config.train.mode)
        if config.distill is not None and trained.count("rslad") == 1:
            raise RunError("rank 0 ran out of memory.\nTraceback")
        return really(config, *rest)

    monkeypatch.setattr(paper_table, "train_once", train)
    table = tmp_path / "work" / "table"
    monkeypatch.setattr("sys.argv", ["jobs/paper_table.py", "--datasets.stripes", "shards"])

    assert run() == 1
    said = capsys.readouterr().err
    assert "1 of 2 cells failed: resnet10t, robust_distillation" in said
    assert "(rank 0 ran out of memory). The report on the others is" in said
    assert "] Failed: rank 0 ran out of memory." in (table / "table.md").read_text()

    assert run() == 0
    assert trained == ["fused_noise", "rslad", "rslad"]

    for folder in [path for path in (tmp_path / "work").rglob("*") if path.is_dir()]:
        (folder / f"{folder.name}-theirs.txt").write_text("theirs")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npz")}
    before |= {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.txt")}
    assert run() == 0
    assert trained == ["fused_noise", "rslad", "rslad"]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    result = json.loads((tmp_path / "result.json").read_text())
    assert [cell["training"] for cell in result["cells"]] == ["adversarial", "robust_distillation"]
    markdown = Path(result["table"]).read_text()
    assert "`spark-submit jobs/paper_table.py --datasets.stripes shards`" in markdown
    assert "Failed: " not in markdown
    with Path(result["csv"]).open() as file:
        found = {(row["training"], row["attack"]) for row in csv.DictReader(file)}
    assert {("robust_distillation", attack) for attack in ("clean", "fgsm", "worst_case")} < found
    assert_nested(MlflowClient(store), result["mlflow"]["run_id"])


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_transfer_is_a_column_made_for_networks_that_are_trained_once(
    spark, run: Run, tmp_path: Path, monkeypatch
) -> None:
    trained: list[str] = []
    really = paper_table.train_once

    def train(config: Any, *rest: Any) -> dict[str, Any]:
        trained.append(config.model.name)
        return really(config, *rest)

    monkeypatch.setattr(paper_table, "train_once", train)

    given = ("--evaluate.attacks", "fgsm,transfer", "--evaluate.sanity_images", "0")
    status = run(*given, models="resnet10t,test_resnet", trainings="original")

    assert status == 0
    assert sorted(trained) == ["resnet10t", "test_resnet"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert "| transfer 2/255 | worst case 2/255 |" in Path(result["table"]).read_text()
    for cell in result["cells"]:
        left = {f["attack"]: f["value"] for f in cell["figures"] if f["metric"] == "accuracy"}
        assert left["worst_case"] <= min(left["fgsm"], left["transfer"])


def assert_nested(client: MlflowClient, table: str) -> None:
    """Assert that each cell is one child of the table, and its runs are children of the cell."""
    (experiment,) = (e for e in client.search_experiments() if e.name == "medspark")
    runs = client.search_runs([experiment.experiment_id])
    children: dict[str | None, list[str]] = {}
    for found in runs:
        parent = found.data.tags.get("mlflow.parentRunId")
        children.setdefault(parent, []).append(found.info.run_id)
        assert found.info.status == "FINISHED"
    assert children[None] == [table]
    assert len(children[table]) == 2
    assert all(len(children[cell]) == 2 for cell in children[table])
    artifacts = {file.path for file in client.list_artifacts(table)}
    assert {"table.md", "table.csv", "table.png", "config.yaml"} <= artifacts


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "There are no datasets: give --datasets.NAME FOLDER or --phantom.counts."),
        ("--datasets.cxr /nowhere", "There is no shard folder /nowhere."),
        ("--phantom.counts 5", "phantom.counts: a synthetic archive has at least 10 images."),
        ("--phantom.counts 20 --weights.vgg x", "weights.vgg: the models of this table are"),
        ("--phantom.counts 20 --weights.resnet50 x", "model.weights: 'x' is not a .safetensors"),
        ("--phantom.counts 20 --models resnet5", "model.name: timm has no model 'resnet5'"),
        ("--phantom.counts 20 --seeds 0,0", "seeds: 0, 0 names one of them twice."),
        ("--phantom.counts 20 --data_share 0", "data_share: shares are above 0 and at most 1."),
        (
            "--launch.processes 2 --spark.master local[2] --train.batch_size 1",
            "train.batch_size 1 is too small: in every step some of the 2 processes have no image",
        ),
        ("--phantom.counts 20 --trainings fast", "trainings.0 cannot be 'fast'"),
        ("--phantom.counts 20 --train.mode standard", "train.mode: standard is no adversarial"),
        (
            "--phantom.counts 20 --models vgg11 --evaluate.attacks transfer",
            "attacks: transfer needs",
        ),
        (
            "--phantom.counts 20 --trainings adversarial --evaluate.attacks transfer",
            "attacks: transfer needs a surrogate",
        ),
        (
            "--phantom.counts 20 --launch.processes 3 --spark.master local[2]",
            "launch.processes is 3, but Spark's master local[2] has 2 slots",
        ),
        ("--phantom.counts 20 --folder /proc/table", "/proc/table cannot be written to: "),
        ("--dataset.cxr here", "There is no key dataset.cxr; did you mean datasets"),
    ],
)
def test_misuse_is_one_sentence_before_spark_starts(
    job: ModuleType, tmp_path: Path, monkeypatch, capsys, argv: str, sentence: str
) -> None:
    monkeypatch.setattr(paper_table, "spark_session", None)
    monkeypatch.chdir(tmp_path)

    status = job.main(argv.split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith(f"paper_table: {sentence}")
    assert "\n" not in said
