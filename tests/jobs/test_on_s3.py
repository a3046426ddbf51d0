"""From an archive to a robustness report, with everything that is read in an object store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_calls import write_classes
from key_files import write_key

from medspark import storage
from medspark.shards.local import local_shards
from medspark.shards.manifest import read_manifest, verify
from medspark.shards.schema import read_labels

Run = Callable[..., dict[str, Any]]

TRAINING = [
    *("--train.epochs", "1", "--train.batch_size", "8", "--train.validation_steps", "1"),
    *("--train.inner_steps", "1", "--train.monitor.action", "off", "--evaluate.steps", "1"),
    *("--evaluate.sanity_images", "0", "--launch.processes", "1", "--model.name", "test_resnet"),
]
EVALUATION = ["--attacks=fgsm", "--eps=2/255", "--bootstrap=2", "--sanity_images=0"]


def upload(folder: Path, url: str) -> str:
    system, place = storage.filesystem(url)
    for path in folder.rglob("*"):
        if path.is_file():
            system.put_file(str(path), f"{place}/{path.relative_to(folder)}")
    return url


@pytest.fixture
def run(s3_spark, load_job, tmp_path: Path) -> Run:
    """Return a function that runs a job and returns its result."""

    def run(job: str, *more: object, tracked: bool = True) -> dict[str, Any]:
        output = tmp_path / f"{job}.json"
        store = [f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'}", "--track.system_metrics=false"]
        words = [*map(str, more), f"--output={output}", *(store if tracked else [])]
        assert load_job(job).main(words) == 0
        return dict(json.loads(output.read_text()))

    return run


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_the_whole_road_leads_through_an_object_store(run: Run, bucket: str, tmp_path: Path):
    source = upload(write_classes(tmp_path / "in", images=48), f"{bucket}/archive")
    key = write_key(tmp_path / "key", "s3")
    samples, shards = f"{bucket}/samples", f"{bucket}/shards"

    run("ingest", "--source", source, "--samples", samples, "--privacy.key_file", key,
        tracked=False)  # fmt: skip
    near = ["--samples", samples, "--near_duplicates", 2]
    here = run("shard", *near, "--shards", tmp_path / "shards", tracked=False)
    there = run("shard", *near, "--shards", shards, tracked=False)
    trained = run("train_at", "--shards", shards, "--run_dir", tmp_path / "run", *TRAINING)
    model = upload(Path(trained["model"]), f"{bucket}/model")
    report = run("evaluate", "--model", model, "--shards", shards, *EVALUATION,
                 "--folder", tmp_path / "evaluations")  # fmt: skip

    assert here["digest"] == there["digest"] == trained["dataset_digest"]
    assert here["splits"] == there["splits"]
    assert there["shards_folder"] == shards
    assert storage.is_file(f"{shards}/near_duplicates.parquet")
    assert report["model"] == model
    assert report["clean"]["accuracy"] == trained["clean"]["accuracy"]


@pytest.mark.spark
@pytest.mark.slow
def test_shards_of_a_store_are_replaced_whole_and_checked(run: Run, bucket: str, tmp_path: Path):
    key = write_key(tmp_path / "key", "s3")
    source, samples = write_classes(tmp_path / "in", images=32), f"{bucket}/samples"
    shards = f"{bucket}/shards"
    run("ingest", "--source", source, "--samples", samples, "--privacy.key_file", key,
        tracked=False)  # fmt: skip

    run("shard", "--samples", samples, "--shards", shards, tracked=False)
    first = read_manifest(shards)
    run("shard", "--samples", samples, "--shards", shards, "--size", 8, tracked=False)
    manifest = read_manifest(shards)
    verify(shards, manifest)

    system, place = storage.filesystem(shards)
    named = {s.path for split in manifest.splits.values() for s in split.shards}
    found = {name[len(place) + 1 :] for name in system.find(place)}
    assert first.generation != manifest.generation
    assert {name for name in found if name.startswith("data/")} == named
    copy = local_shards(shards)
    labels = [read_labels(copy / name) for name in named]
    assert sum(map(len, labels)) == 32


@pytest.mark.parametrize("job", ["train_at", "evaluate", "shard", "ingest", "predict"])
def test_a_missing_bucket_is_one_sentence_and_status_2(
    load_job, s3_environment, home: Path, network: Path, tmp_path: Path, capsys, job: str
):
    words = {
        "train_at": ["--shards", "s3://nowhere/x"],
        "evaluate": ["--shards", "s3://nowhere/x", "--model", network],
        "shard": ["--samples", "s3://nowhere/x", "--shards", tmp_path / "shards"],
        "ingest": ["--source", "s3://nowhere/x", "--samples", tmp_path / "samples"],
        "predict": ["--source", home / "source", "--answers", "s3://nowhere/x", "--model", network],
    }[job]

    status = load_job(job).main([*map(str, words), "--output", str(tmp_path / "r.json")])

    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{job}: There is no bucket nowhere")


@pytest.mark.parametrize("job", ["train_at", "federate", "evaluate", "recalibrate"])
def test_a_folder_of_work_stays_on_a_file_system(load_job, tmp_path: Path, capsys, job: str):
    setting = "folder" if job == "evaluate" else "run_dir"
    more = ["--model", "x"] if job in ("evaluate", "recalibrate") else []
    more += ["--images", "16"] if job == "recalibrate" else []

    status = load_job(job).main([f"--{setting}", "s3://bucket/x", "--shards", "x", *more])

    assert status == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{job}: {setting}: s3://bucket/x is an address: ")
