"""Every job and the folder it is given: what somebody else put there is there afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_calls import DEMO, JOBS, Call, Files, files, write_classes
from PIL import Image

from medspark.lock import locked
from medspark.ownership import MARKER, claim
from medspark.shards.manifest import read_manifest, verify
from medspark.train.result import TrainResult
from medspark.workflows import federate as federating
from medspark.workflows import paper_table, recipe_table
from medspark.workflows import scale_at as scaling
from medspark.workflows import train_at as training

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Names that jobs give and names that they do not, of folders and of files.
FOLDERS = (
    "data", "data/xrays", "ledger/x", "quarantine", "staging/files", "model", "report", "plain",
    "attempts/0001", "checkpoints/step-000000005-attempt-0001", "journal", "cells/0f", "table",
    "evaluations/0f/pieces", "pieces", "networks/0f/checkpoints", "archive", "samples", "mine", "",
)  # fmt: skip
NAMES = (
    "a.dcm", "model.safetensors", "result.json", "run.json", "manifest.json", "labels.csv",
    "piece-00000.npz", "train-00000.parquet", "near_duplicates.parquet", ".lock", "notes.txt",
)  # fmt: skip
PLANTED = st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), min_size=1)


# What each job is told but for the folder that it writes to.
@pytest.fixture
def no_spark(monkeypatch: pytest.MonkeyPatch, load_job: Callable[[str], ModuleType]) -> None:
    """Fail where a job starts Spark."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Spark was started")

    names = ("ingest", "shard", "evaluate", "export_edge", "detect", "predict")
    jobs = [load_job(name) for name in names]
    for module in (training, scaling, paper_table, recipe_table, federating, *jobs):
        monkeypatch.setattr(module, "spark_session", started)


def plant(folder: Path, planted: set[tuple[str, str]]) -> Files:
    for place, name in planted:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).write_text(f"somebody's {place} {name}")
    return files(folder)


@contextlib.contextmanager
def new_target(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, DEMO if "built-in" in name else "target")


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize("name", JOBS)
@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(planted=PLANTED)
def test_a_strangers_folder_is_refused_in_a_sentence_before_spark_and_left(
    call: Call, name: str, planted: set[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with new_target(name) as target:
        before = plant(target, planted)

        status = call(name, target)

        said = capsys.readouterr().err
        assert (status, len(said.splitlines())) == (2, 1), said
        assert "not medspark's" in said or "is not a manifest" in said
        assert files(target) == before


@pytest.mark.usefixtures("no_spark")
def test_an_archive_is_not_its_own_target(call: Call, home: Path, tmp_path: Path, capsys) -> None:
    write_classes(tmp_path / "proj" / "data" / "xrays")
    before = files(tmp_path / "proj")

    status = call("ingest", tmp_path / "proj", "--source", tmp_path / "proj" / "data" / "xrays")

    assert status == 2
    assert "should not lie inside the samples" in capsys.readouterr().err
    assert files(tmp_path / "proj") == before


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize(
    ("name", "key", "source", "target"),
    [
        ("ingest", "--source", "a", "a/b"),
        ("ingest", "--source", "a/b", "a"),
        ("ingest", "--source", "a", "link"),
        ("ingest", "--source", "link", "a/b"),
        ("shard", "--samples", "a", "a/b"),
        ("shard", "--samples", "a/b", "a"),
        ("train_at", "--shards", "a", "a/b"),
        ("train_at", "--shards", "a/b", "a"),
        ("train_at", "--shards", "link", "a"),
        ("distill", "--distill.teacher", "a/b", "a"),
        ("distill", "--distill.teacher", "link/b", "a"),
        ("evaluate", "--model", "a/b", "a"),
        ("evaluate", "--model", "a", "a/b"),
        ("evaluate", "--shards", "a", "a/b"),
        ("export_edge", "--model", "a/b", "a"),
        ("export_edge", "--shards", "a", "a/b"),
        ("detect", "--model", "a/b", "a"),
        ("detect", "--model", "a", "a/b"),
        ("detect", "--shards", "a", "a/b"),
        ("predict", "--source", "a", "a/b"),
        ("predict", "--source", "a/b", "a"),
        ("predict", "--model", "a", "a/b"),
        ("predict", "--model", "a/b", "a"),
        ("scale_at", "--shards", "a/b", "a"),
        ("federate", "--shards", "a/b", "a"),
        ("federate", "--shards", "a", "a/b"),
        ("federate", "--adversary.edge", "a", "a/b"),
        ("paper_table", "--datasets.x", "a", "a/b"),
        ("recipe_table", "--shards.x", "a/b", "a"),
        ("backdoor_table", "--shards", "a/b", "a"),
        ("backdoor_table", "--adversary.edge", "a", "a/b"),
    ],
)
def test_what_is_read_and_what_is_written_are_apart(
    call: Call, name: str, key: str, source: str, target: str, home: Path, tmp_path: Path,
    network: Path, capsys,
) -> None:  # fmt: skip
    kind = {"--source": home / "source", "--samples": home / "samples"}
    kind |= dict.fromkeys(("--shards", "--shards.x", "--datasets.x"), tmp_path / "shards")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to("a")
    place = tmp_path / "root" / source
    place.parent.mkdir(parents=True, exist_ok=True)
    real = place.parent.resolve() / "a" if source == "link" else place
    shutil.copytree(kind.get(key, network), real, dirs_exist_ok=True)
    before = files(tmp_path / "root")

    status = call(name, tmp_path / "root" / target, key, place)

    said = capsys.readouterr().err
    assert status == 2, said
    assert "should not lie inside" in said
    assert files(tmp_path / "root") == before


# --- folders of ours ---


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize("name", ["train_at", "train_at, going on", "train_at, over what is there",
                                  "distill", "federate", "federate, going on", "scale_at",
                                  "paper_table"])  # fmt: skip
def test_a_folder_that_another_job_writes_is_refused_before_spark_and_its_holder_named(
    call: Call, name: str, tmp_path: Path, capsys
) -> None:
    target = tmp_path / "target"
    claim(target, "study" if name in ("scale_at", "paper_table") else "run")
    with locked(target):
        before = files(target)
        assert call(name, target) == 2
        assert files(target) == before

    said = capsys.readouterr().err
    assert f"Another job is writing {target} (process {os.getpid()} on " in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let a training leave what one leaves, in no time; return the folders that were trained in."""
    seen: list[Path] = []

    def train_once(config: Any, _spark: object, folder: Path, **_: object) -> TrainResult:
        seen.append(folder)
        for name in ("run.json", "model/model.json", "report/result.json", "attempts/0001/nonce"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"n": len(seen)}))
        fields = TrainResult.model_fields.items()
        blank = {name: "" if f.annotation is str else 0 for name, f in fields if f.is_required()}
        return TrainResult.model_validate(
            blank | {
                "mode": config.train.mode, "steps": len(seen), "model": str(folder / "model"),
                "clean": {"accuracy": 1.0, "auroc": 1.0}, "launch": {"launched_at": 0.0},
                "mlflow": {"uri": "sqlite:///x"},
            }
        )  # fmt: skip

    monkeypatch.setattr(training, "train_once", train_once)
    monkeypatch.setattr(training, "spark_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(training, "check_model", lambda _: None)
    monkeypatch.setattr(training, "check_images", lambda *_: None)
    return seen


def steps(home: Path) -> int:
    return int(json.loads((home / "out" / "result.json").read_text())["steps"])


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(planted=PLANTED)
def test_a_run_that_is_replaced_leaves_the_files_of_others(
    call: Call, trained: list[Path], planted: set[tuple[str, str]]
) -> None:
    named = {"model/model.safetensors", "report/result.json", "run.json", "result.json"}
    named |= {"manifest.json", "plain/model.safetensors", "plain/run.json", "plain/result.json"}
    theirs = {
        (place, name) for place, name in planted if f"{place}/{name}".lstrip("/") not in named
    }
    with new_target("train_at") as target:
        assert call("train_at", target) == 0
        before = plant(target, theirs)
        assert call("train_at, over what is there", target) == 0

        after = files(target)
        for place, name in theirs:
            assert after[f"{place}/{name}".lstrip("/")] == before[f"{place}/{name}".lstrip("/")]


def test_a_finished_run_is_refused_returned_or_replaced_as_it_is_asked_for(
    call: Call, trained: list[Path], home: Path, tmp_path: Path, capsys
) -> None:
    target = tmp_path / "target"
    assert call("train_at", target) == 0
    before = files(target) | {".lock": b""}  # it says since when it is held

    assert call("train_at", target) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files(target) | {".lock": b""} == before
    assert call("train_at, going on", target) == 0
    assert (steps(home), len(trained)) == (1, 1)
    assert call("train_at, over what is there", target) == 0
    assert (steps(home), len(trained)) == (2, 2)


def test_a_finished_run_is_not_returned_for_another_question(
    call: Call, trained: list[Path], tmp_path: Path, capsys
) -> None:
    assert call("train_at", tmp_path / "target") == 0

    assert call("train_at, going on", tmp_path / "target", "--evaluate.steps", "3") == 0
    assert len(trained) == 2  # it has to be attacked anew
    assert call("train_at, going on", tmp_path / "target", "--train.lr", "1e-5") == 2
    assert "another configuration" in capsys.readouterr().err
    assert len(trained) == 2


def test_a_baseline_that_is_done_is_not_done_again(
    call: Call, trained: list[Path], home: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    assert call("train_at", target, "--baseline", "true") == 0
    (target / "finished.json").unlink()

    assert call("train_at, going on", target, "--baseline", "true") == 0
    assert [folder.name for folder in trained] == ["plain", "target", "target"]
    assert json.loads((home / "out" / "result.json").read_text())["baseline"]["mode"] == "standard"


def test_overwrite_and_resume_exclude_each_other(call: Call, tmp_path: Path, capsys) -> None:
    assert call("train_at, going on", tmp_path / "target", "--overwrite") == 2
    assert "give one" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_by_default_a_run_gets_a_folder_of_its_own_and_the_model_is_said(
    load_job: Callable[[str], ModuleType], write_shards, trained: list[Path], tmp_path: Path, capsys
) -> None:
    words = ["--shards", str(write_shards(rows=16)), "--output", str(tmp_path / "result.json")]

    for name in ("result.run", "result-2.run"):
        assert load_job("train_at").main(words) == 0
        assert f"Model: {tmp_path / name / 'model'}" in capsys.readouterr().out
    assert [folder.name for folder in trained] == ["result.run", "result-2.run"]


@pytest.mark.spark
def test_ingest_and_shard_leave_the_files_of_others_in_folders_of_ours(
    spark: SparkSession, call: Call, home: Path, tmp_path: Path
) -> None:
    samples, shards = tmp_path / "samples", tmp_path / "made"
    archive = write_classes(tmp_path / "archive", images=40)
    read = ("--source", archive, "--image_size", "16")
    assert call("ingest", samples, *read) == 0
    assert call("shard", shards, "--samples", samples) == 0
    # Below the generations that are replaced, too.
    places = [str(p.parent.relative_to(tmp_path)) for p in tmp_path.glob("[ms]a*/*/*/*.parquet")]
    places += ["samples", "samples/data", "samples/mine", "made", "made/data"]
    theirs = {(place, name) for place in places for name in ("notes.txt", "a.dcm", "x.parquet.bak")}
    planted = plant(tmp_path, theirs)

    for number in range(3):
        Image.new("L", (32, 32), 10 * number).save(archive / "a" / f"more-{number}.png")
        assert call("ingest", samples, *read) == 0
    assert call("shard", shards, "--samples", samples, "--seed", "1") in (0, 2)

    after = files(tmp_path)
    for place, name in theirs:
        assert after[f"{place}/{name}"] == planted[f"{place}/{name}"]
    assert MARKER in {path.name for path in samples.iterdir()}
    verify(shards, read_manifest(shards), contents=True)
