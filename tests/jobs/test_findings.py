"""Images with any number of findings, from a table of labels to an attacked network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from medspark.config import load_config
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.label_table import LabelConfig
from medspark.ingest.pipeline import ingest
from medspark.models.card import read_card
from medspark.models.predictor import Predictor
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.shards.manifest import read_manifest
from medspark.train.config import FitConfig
from medspark.train.loop import fit
from medspark.train.result import TrainResult
from medspark.train.world import World
from medspark.workflows.model_description import describe_model

LABELS = ("Cardiomegaly|Effusion", "Effusion", "No Finding", "", "Mass|Effusion", "Mass")
CLASSES = ["Cardiomegaly", "Effusion", "Mass"]


def write_images(folder: Path) -> IngestConfig:
    """Write 36 images with their table and return how to ingest them, findings by ``|``."""
    random = np.random.default_rng(0)
    (folder / "in").mkdir()
    rows = ["path,label"]
    for number in range(36):
        pixels = random.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{number}.png")
        rows.append(f"{number}.png,{LABELS[number % len(LABELS)]}")
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return IngestConfig(
        source=str(folder / "in"),
        labels=str(folder / "labels.csv"),
        samples=str(folder / "samples"),
        label_table=LabelConfig(separator="|", match="name"),
        guarded=False,
    )


class Nobody:
    def record(self, step: int, metrics: object) -> None:
        """Keep nothing."""


@pytest.mark.spark
@pytest.mark.slow
def test_findings_go_all_the_way_from_a_table_to_an_attacked_network(
    spark, load_job: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ingested = ingest(spark, open_archive(write_images(tmp_path), key=b"\x22" * 32))
    shards = tmp_path / "shards"
    config = load_config(ShardConfig, [f"--samples={tmp_path / 'samples'}", f"--shards={shards}"])
    make_shards(spark, config, open_samples(config))
    training = FitConfig.model_validate(
        {
            "shards": shards,
            "run_dir": tmp_path / "run",
            "model": {"name": "test_efficientnet"},
            "train": {"epochs": 1, "batch_size": 8, "class_weights": "balanced"},
            "evaluate": {"attacks": ["fgsm"], "sanity_images": 0},
        }
    )
    trained = fit(training, World(0, 0, 1, torch.device("cpu")), Nobody())
    status = load_job("evaluate").main(
        [
            *(f"--model={trained['model']}", f"--shards={shards}", "--attacks=pgd", "--gallery=1"),
            *("--eps=0,2/255", "--steps=2", "--bootstrap=20", f"--folder={tmp_path / 'work'}"),
            f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'}",
            *("--track.system_metrics=false", f"--output={tmp_path / 'report.json'}"),
        ]
    )

    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert ingested["labels"] == {"Cardiomegaly": 6, "Effusion": 18, "Mass": 12, "No Finding": 12}
    manifest = read_manifest(shards)
    assert (list(manifest.classes), manifest.multi_label) == (CLASSES, True)
    counts = np.sum([split.class_counts for split in manifest.splits.values()], axis=0)
    assert counts.tolist() == [6, 18, 12]
    split = MappedSplit(shards, manifest, "test")
    assert split.labels.sum(0).tolist() == list(manifest.splits["test"].class_counts)
    assert trained["clean"].keys() == report["clean"].keys() - {"intervals", "classes"}
    assert [each["name"] for each in report["clean"]["classes"]] == CLASSES
    assert report["attacks"][0]["accuracy"] == report["clean"]["accuracy"]
    assert report["worst_case"][-1]["accuracy"] <= report["clean"]["accuracy"]
    told = describe_model(
        TrainResult.model_validate(trained), manifest, read_card(Path(trained["model"]))
    )
    assert "Finds any of Cardiomegaly, Effusion, Mass" in told
    answers = Predictor.load(Path(trained["model"]))(split.gather(np.arange(4))[0])
    assert not np.allclose(answers.sum(1), 1)


def test_samples_of_one_label_and_of_several_are_not_mixed(tmp_path: Path) -> None:
    config = write_images(tmp_path).model_copy(update={"labels": None})

    with pytest.raises(UsageError, match="label_table describes a label table"):
        open_archive(config.model_copy(update={"inventory": "somewhere"}))
