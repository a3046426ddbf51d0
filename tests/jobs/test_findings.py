"""Images with any number of findings, from a table of labels to an attacked network."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.ingest.archive import IngestConfig, open_archive
from medspark.models.predictor import Predictor
from medspark.shards.manifest import read_manifest

Load = Callable[[str], ModuleType]


@pytest.fixture
def run(load_job: Load, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a job and returns its result document."""

    def run(name: str, *argv: object) -> dict[str, Any]:
        output = tmp_path / f"{name}.json"
        assert load_job(name).main([*map(str, argv), f"--output={output}"]) == 0
        result: dict[str, Any] = json.loads(output.read_text())
        return result

    return run


def with_findings(table: Path) -> None:
    """Give every image of a table, besides its class, findings by its number: copies the same."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        stem = Path(row["path"]).stem
        number = int(stem) if stem.isdigit() else 0
        ill = ["Pneumonia"] if row["label"] == "pneumonia" else []
        more = ["Edema"] * (number % 2) + ["Atelectasis"] * (number % 5 == 0)
        row["label"] = "|".join([*more, *ill]) or ("No Finding" if number % 3 else "")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.ddp
def test_findings_go_all_the_way_from_a_table_to_an_attacked_network(
    spark, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_archive(tmp_path / "in", PhantomConfig(count=60, size=32, seed=5))
    with_findings(tmp_path / "in" / "labels.csv")
    (tmp_path / "key").write_text("22" * 32)

    ingested = run(
        "ingest", "--source", tmp_path / "in", "--labels", tmp_path / "in" / "labels.csv",
        "--label_table.separator", "|", "--samples", tmp_path / "samples",
        "--image_size", 32, "--privacy.key_file", tmp_path / "key", "--guarded", "false",
    )  # fmt: skip
    sharded = run("shard", "--samples", tmp_path / "samples", "--shards", tmp_path / "s")
    trained = run(
        "train_at", "--shards", tmp_path / "s", "--model.name", "mobilenetv2_050",
        "--train.epochs", 1, "--train.class_weights", "balanced", "--evaluate.steps", 2,
        "--evaluate.eps", "[0.01]", "--launch.processes", 1, "--run_dir", tmp_path / "run",
        "--track.uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--track.log_model", "false",
    )  # fmt: skip
    report = run(
        "evaluate", "--model", trained["model"], "--shards", tmp_path / "s",
        "--attacks", "pgd,apgd", "--eps", "0,2", "--steps", 2, "--bootstrap", 20,
        "--folder", tmp_path / "work", "--track.uri", f"sqlite:///{tmp_path / 'mlflow.db'}",
    )  # fmt: skip

    classes = ["Atelectasis", "Edema", "Pneumonia"]
    assert list(ingested["labels"]) == ["Atelectasis", "Edema", "No Finding", "Pneumonia"]
    assert (sharded["classes"], sharded["multi_label"]) == (classes, True)
    counts = np.sum([split["class_counts"] for split in sharded["splits"].values()], axis=0)
    assert counts.tolist() == [ingested["labels"][name] for name in classes]
    manifest = read_manifest(tmp_path / "s")
    split = MappedSplit(tmp_path / "s", manifest, "test")
    assert split.labels.sum(0).tolist() == list(manifest.splits["test"].class_counts)
    assert trained["clean"].keys() == report["clean"].keys() - {"intervals", "classes"}
    assert [each["name"] for each in report["clean"]["classes"]] == classes
    assert report["attacks"][0]["accuracy"] == report["clean"]["accuracy"]
    assert report["worst_case"][-1]["accuracy"] <= report["clean"]["accuracy"]
    card = (tmp_path / "run").rglob("MODEL_CARD.md")
    assert "Finds any of Atelectasis, Edema, Pneumonia" in next(card).read_text()
    answers = Predictor.load(Path(trained["model"]))(split.gather(np.arange(4))[0])
    assert not np.allclose(answers.sum(1), 1)


def test_a_separator_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "NORMAL").mkdir(parents=True)
    config = IngestConfig.model_validate(
        {
            "source": str(tmp_path / "in"),
            "samples": str(tmp_path / "out"),
            "label_table": {"separator": "|"},
        }
    )

    with pytest.raises(UsageError, match="label_table is about a table of labels"):
        open_archive(config)
