"""Folders that commit 7d5e264 wrote still open, and say what they said (tests/fixtures/7d5e264)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from key_files import write_key

from medspark.config import load_config
from medspark.images.deidentify import Pseudonyms
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.schema import read_sites

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

OLD = Path(__file__).parent / "fixtures" / "7d5e264"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the old folders, its archive as old as when it was ingested."""
    folder = tmp_path_factory.mktemp("old") / "7d5e264"
    shutil.copytree(OLD, folder)
    for path in (folder / "archive").rglob("*"):
        os.utime(path, (EXPECTED["mtime"], EXPECTED["mtime"]))
    return folder


@pytest.fixture(scope="session")
def again(spark: SparkSession, old: Path) -> dict[str, Any]:
    """Ingest the old archive once more onto the old samples; return the result."""
    config = IngestConfig.model_validate(
        {
            "source": str(old / "archive"),
            "labels": str(old / "archive" / "labels.csv"),
            "samples": str(old / "samples"),
            "image_size": 32,
            "guarded": False,
            "privacy": {
                "key_file": write_key(old / "key", "7d5e264"),
                "quarantine_file": old / "quarantine.csv",
            },
        }
    )
    archive = open_archive(config)
    move_archive(old / "samples", old / "archive", archive.pseudonyms)
    return ingest(spark, archive)


def move_archive(samples: Path, archive: Path, pseudonyms: Pseudonyms) -> None:
    """Let the old ledger know the archive where it is now: its keys depend on the path."""
    then, key = EXPECTED["source"], pseudonyms.name
    paths = [path.relative_to(archive).as_posix() for path in archive.rglob("*")]
    moved = {key("file", f"{then}/{path}"): key("file", f"{archive}/{path}") for path in paths}
    moved[key("source", then)] = key("source", str(archive))
    for file in [*samples.glob("ledger/*/*"), *samples.glob("quarantine/*/*")]:
        table = pq.read_table(file)
        for column in ("source_key", "file_key"):
            keys = [moved[known] for known in table[column].to_pylist()]
            index = table.schema.get_field_index(column)
            table = table.set_column(index, column, pa.array(keys))
        pq.write_table(table, file)


def pixels_of(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 over the pixels of each split, in the order of its shards."""
    digests = {}
    for name, split in manifest.splits.items():
        tables = [pq.read_table(folder / shard.path, columns=["pixels"]) for shard in split.shards]
        pixels = b"".join(b"".join(table["pixels"].to_pylist()) for table in tables)
        digests[name] = hashlib.sha256(pixels).hexdigest()
    return digests


@pytest.mark.spark
def test_ingest_onto_old_samples_adds_nothing_and_loses_nothing(again):
    assert {name: again[name] for name in EXPECTED["ingest"]} == EXPECTED["ingest"]
    assert (again["new"], again["changed"], again["unchanged"]) == (0, 0, again["files_seen"])
    assert (again["added"], again["removed"]) == (0, 0)


def shard(spark: SparkSession, samples: Path, shards: Path) -> Manifest:
    argv = [f"--samples={samples}", f"--shards={shards}", "--shard_bytes=8192"]
    config = load_config(ShardConfig, [*argv, "--split.val=0.2", "--split.test=0.3"])
    make_shards(spark, config, open_samples(config))
    return read_manifest(shards)


@pytest.mark.spark
@pytest.mark.usefixtures("again")
def test_old_samples_give_the_same_shards_after_an_ingest(spark, old: Path, tmp_path: Path):
    manifest = shard(spark, old / "samples", tmp_path)

    assert pixels_of(tmp_path, manifest) == EXPECTED["shards"]["pixels_sha256"]


@pytest.mark.spark
def test_old_samples_give_the_same_shards_as_they_are(spark, tmp_path: Path):
    samples = Path(shutil.copytree(OLD / "samples", tmp_path / "samples"))
    manifest = shard(spark, samples, tmp_path / "shards")

    assert pixels_of(tmp_path / "shards", manifest) == EXPECTED["shards"]["pixels_sha256"]


def test_old_shards_are_whole_and_hold_the_same_pixels():
    manifest = read_manifest(OLD / "shards")
    verify(OLD / "shards", manifest)

    assert manifest.digest == EXPECTED["shards"]["digest"]
    assert {name: split.rows for name, split in manifest.splits.items()} == (
        EXPECTED["shards"]["rows"]
    )
    assert pixels_of(OLD / "shards", manifest) == EXPECTED["shards"]["pixels_sha256"]


def test_no_site_is_known_of_an_old_shard():
    splits = read_manifest(OLD / "shards").splits.values()
    paths = [OLD / "shards" / shard.path for split in splits for shard in split.shards]

    assert [site for path in paths for site in read_sites(path)] == 48 * [""]


@pytest.mark.parametrize("reader", ["native", "petastorm"])
def test_an_epoch_reads_every_old_training_image_once(reader: str):
    from medspark.data.config import DataConfig
    from medspark.data.source import open_source

    manifest = read_manifest(OLD / "shards")
    paths = [OLD / "shards" / shard.path for shard in manifest.splits["train"].shards]
    stored = [pixels for path in paths for pixels in pq.read_table(path)["pixels"].to_pylist()]

    config = DataConfig.model_validate({"reader": reader, "augment": {"flip": 0}})
    reading = open_source(OLD / "shards", config).training(global_batch=5, seed=0, rank=0, world=1)
    read = [image.numpy().tobytes() for batch in reading.batches(0) for image in batch.images]

    assert sorted(read) == sorted(stored)


def test_an_old_model_gives_old_test_images_the_same_probabilities():
    import torch

    from medspark.data.native import MappedSplit
    from medspark.models.checkpoint import load_classifier

    split = MappedSplit(OLD / "shards", read_manifest(OLD / "shards"), "test")
    images, labels = split.tensors(np.arange(len(split)))
    with torch.no_grad():
        probabilities = load_classifier(OLD / "model").eval()(images).softmax(1)[:, 1]

    assert labels.tolist() == EXPECTED["test_images"]["labels"]
    np.testing.assert_allclose(
        probabilities.numpy(), EXPECTED["test_images"]["probabilities"], rtol=0, atol=3e-5
    )


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_evaluating_an_old_model_on_old_shards_gives_the_old_metrics(load_job, tmp_path: Path):
    output = tmp_path / "result.json"
    status = load_job("evaluate").main(
        [
            f"--model={OLD / 'model'}",
            f"--shards={OLD / 'shards'}",
            "--attacks=fgsm,pgd",
            "--eps=0,2/255,4/255",
            "--steps=5",
            "--bootstrap=20",
            "--gallery=0",
            f"--folder={tmp_path / 'work'}",
            f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'}",
            "--track.system_metrics=false",
            f"--output={output}",
        ]
    )

    assert status == 0
    result, expected = json.loads(output.read_text()), EXPECTED["evaluate"]
    assert result["images"] == expected["images"]
    for metrics, known in [
        (result["clean"], expected["clean"]),
        *zip(result["worst_case"], expected["worst_case"], strict=True),
    ]:
        for name in ("accuracy", "auroc"):
            assert metrics[name] == pytest.approx(known[name], abs=1e-6)
