"""Archives and samples in an object store: the same dataset, one writer, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_runs import put
from s3_server import serving

from medspark import storage
from medspark.errors import RunError, UsageError
from medspark.images.deidentify import Privacy
from medspark.ingest import pipeline
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.forget import ForgetConfig, forget, open_dataset, read_patients
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


def upload(folder: Path, url: str) -> str:
    system, place = storage.filesystem(url)
    for path in folder.rglob("*"):
        if path.is_file():
            system.put_file(str(path), f"{place}/{path.relative_to(folder)}")
    return url


def run_to(
    spark: SparkSession, source: str, samples: str, key: Path, **values: Any
) -> dict[str, Any]:
    config = {
        "source": source,
        "samples": samples,
        "image_size": 16,
        "privacy": {"key_file": key, "quarantine_file": key.parent / "quarantine.csv"},
        "guarded": False,
    }
    return ingest(spark, open_archive(IngestConfig.model_validate(config | values)))


def names(url: str) -> set[str]:
    system, place = storage.filesystem(url)
    return {name[len(place) + 1 :] for name in system.find(place)}


def check_whole(samples: str) -> None:
    """Check that the ledger's rows have their pixels, and that no task left a file more."""
    manifest = SampleSet(samples).manifest()
    assert manifest
    system, place = storage.filesystem(samples)

    def rows(name: str) -> list[dict[str, Any]]:
        return list(pq.read_table(f"{place}/{name}", filesystem=system).to_pylist())

    parts = {part.path: rows(part.path) for part in manifest.parts}
    kept = [row for file in manifest.ledger for row in rows(file) if row["outcome"] == "sample"]
    assert len({(row["part"], row["row"]) for row in kept}) == len(kept)
    assert all(parts[row["part"]][row["row"]]["sample_key"] == row["sample_key"] for row in kept)
    found = names(samples)
    assert set(parts) <= found
    newest = {name for name in found if name.startswith(f"data/{manifest.generation}/")}
    assert newest <= set(parts)
    assert not any(name.startswith("staging/") for name in found)


@pytest.mark.slow
def test_a_dataset_is_the_same_wherever_it_and_its_archive_lie(
    s3_spark, phantom, ingested, bucket, key_file, tmp_path
):
    source = upload(phantom[0], f"{bucket}/archive")
    shutil.copy(key_file, tmp_path / "key")

    result = run_to(
        s3_spark, source, f"{bucket}/samples", tmp_path / "key", labels=f"{source}/labels.csv"
    )

    here = json.loads((ingested[0] / "manifest.json").read_text())
    there = SampleSet(f"{bucket}/samples").manifest()
    assert there
    assert there.digest == here["digest"]
    same = ("files_seen", "samples", "duplicates", "quarantined", "quarantine_reasons", "labels")
    assert {name: result[name] for name in same} == {name: ingested[1][name] for name in same}
    check_whole(f"{bucket}/samples")
    listed = (tmp_path / "quarantine.csv").read_text()
    assert f"{bucket}/archive/" in listed


@pytest.mark.slow
def test_ingest_again_adds_what_is_new_and_no_more(s3_spark, bucket, key_file, tmp_path):
    put(tmp_path / "in", A__x=1, A__y=2, B__x=3)
    samples = f"{bucket}/deep/samples"
    shutil.copy(key_file, tmp_path / "key")

    def run() -> dict[str, Any]:
        source = upload(tmp_path / "in", f"{bucket}/archive")
        return run_to(s3_spark, source, samples, tmp_path / "key")

    first = run()
    before = storage.read_text(f"{samples}/manifest.json")
    # An object has a new time when it is uploaded again: its content decides.
    again = run()
    put(tmp_path / "in", B__new=9)
    more = run()

    assert (first["samples"], again["samples"], again["added"]) == (3, 3, 0)
    assert before is not None
    assert (more["samples"], more["added"], more["removed"]) == (4, 1, 0)
    check_whole(samples)


@pytest.mark.slow
def test_a_writer_that_was_overtaken_loses_and_spoils_nothing(
    s3_spark, bucket, key_file, tmp_path, monkeypatch
):
    put(tmp_path / "in", A__x=1, B__x=2)
    samples = f"{bucket}/samples"
    shutil.copy(key_file, tmp_path / "key")
    real = pipeline._Ingest.run

    def overtaken(work: Any) -> dict[str, Any]:
        """Ingest, after another job has taken the folder over and committed."""
        monkeypatch.setattr(pipeline._Ingest, "run", real)
        storage.write_text(f"{samples}/.lease", "{}")
        put(tmp_path / "other", C__x=5)
        run_to(s3_spark, str(tmp_path / "other"), samples, tmp_path / "key")
        return real(work)

    monkeypatch.setattr(pipeline._Ingest, "run", overtaken)

    with pytest.raises(RunError, match="Another job changed"):
        run_to(s3_spark, str(tmp_path / "in"), samples, tmp_path / "key")
    manifest = SampleSet(samples).manifest()
    assert manifest
    assert manifest.counts["samples"] == 1
    result = run_to(s3_spark, str(tmp_path / "in"), samples, tmp_path / "key")

    assert result["samples"] == 2
    check_whole(samples)


def test_a_second_ingest_at_once_is_told_so(s3_spark, bucket, key_file, tmp_path):
    from medspark.lock import locked

    put(tmp_path / "in", A__x=1, B__x=2)

    with locked(f"{bucket}/samples"), pytest.raises(UsageError, match="Another job is writing"):
        storage.write_text(f"{bucket}/samples/.medspark.json", '{"kind": "samples"}')
        shutil.copy(key_file, tmp_path / "key")
        run_to(s3_spark, str(tmp_path / "in"), f"{bucket}/samples", tmp_path / "key")


def test_a_store_that_fails_is_no_bad_file(s3_spark, bucket, key_file, tmp_path, monkeypatch):
    put(tmp_path / "in", A__x=1, B__x=2)
    source = upload(tmp_path / "in", f"{bucket}/archive")
    shutil.copy(key_file, tmp_path / "key")
    environment = dict(s3_spark.sparkContext.environment)

    with serving() as other:  # where workers do not find the bucket
        worse = environment | {"AWS_ENDPOINT_URL": other}
        monkeypatch.setattr(s3_spark.sparkContext, "environment", worse)
        with pytest.raises(RunError, match="A Spark task failed: There is no bucket"):
            run_to(s3_spark, source, str(tmp_path / "samples"), tmp_path / "key")

    assert SampleSet(str(tmp_path / "samples")).manifest() is None


def test_a_medmnist_archive_of_a_store_is_read(s3_spark, bucket, key_file, tmp_path):
    images = np.arange(4 * 16 * 16, dtype=np.uint8).reshape(4, 16, 16)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.array([[0], [1], [0], [1]]))
    system, place = storage.filesystem(f"{bucket}/x.npz")
    system.put_file(str(tmp_path / "x.npz"), place)
    shutil.copy(key_file, tmp_path / "key")

    result = run_to(s3_spark, f"{bucket}/x.npz", f"{bucket}/samples", tmp_path / "key")

    assert result["files_seen"] == 4


@pytest.mark.parametrize("setting", ["source", "samples"])
def test_a_missing_bucket_is_said_before_anything_is_written(
    s3_spark, bucket, key_file, tmp_path, setting
):
    put(tmp_path / "in", A__x=1, B__x=2)
    shutil.copy(key_file, tmp_path / "key")
    places = {"source": str(tmp_path / "in"), "samples": f"{bucket}/samples"}

    with pytest.raises(UsageError, match="There is no bucket nowhere"):
        run_to(s3_spark, key=tmp_path / "key", **(places | {setting: "s3://nowhere/x"}))

    assert names(bucket) == set()


@pytest.mark.slow
def test_a_patient_leaves_a_dataset_of_a_store(s3_spark, bucket, key_file, tmp_path):
    put(tmp_path / "in", A__x=1, A__y=2, B__x=3)
    shutil.copy(key_file, tmp_path / "key")
    samples = f"{bucket}/samples"
    run_to(s3_spark, str(tmp_path / "in"), samples, tmp_path / "key")
    manifest = SampleSet(samples).manifest()
    assert manifest
    system, place = storage.filesystem(samples)
    table = pq.read_table(f"{place}/{manifest.parts[0].path}", filesystem=system)
    (tmp_path / "patients.txt").write_text(table["patient_key"][0].as_py())

    config = ForgetConfig(
        samples=samples,
        patients=tmp_path / "patients.txt",
        privacy=Privacy(key_file=tmp_path / "key", quarantine_file=tmp_path / "q.csv"),
    )
    dataset = open_dataset(config)
    gone = forget(s3_spark, dataset, read_patients(config.patients, dataset.pseudonyms))

    assert (gone["patients"], gone["samples"]) == (1, 1)
    check_whole(samples)
    after = SampleSet(samples).manifest()
    assert after
    assert after.counts["samples"] == 2
    assert {name for name in names(samples) if name.startswith("data/")} == {
        part.path for part in after.parts
    }
