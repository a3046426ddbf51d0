"""train_at as a user meets it: from nothing to a robust model, and what is said about mistakes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from tensors import same_tensors

from medspark.models.checkpoint import load_classifier
from medspark.shards.manifest import read_manifest
from medspark.track.models import fetch_model
from medspark.workflows import train_at as training

ROOT = Path(__file__).parents[2]
TINY = (
    *("--demo.count", 80, "--demo.image_size", 32, "--model.name", "mobilenetv2_050"),
    *("--train.epochs", 1, "--evaluate.steps", 2, "--evaluate.sanity_images", 0),
    *("--launch.processes", 2),
)


@pytest.fixture(scope="module")
def job(load_job: Callable[[str], ModuleType]) -> ModuleType:
    return load_job("train_at")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


def _submit(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            Path(sys.executable).with_name("spark-submit"),
            ROOT / "jobs" / "train_at.py",
            *("--profile", ROOT / "conf" / "profiles" / "local.yaml"),
            *map(str, arguments),
        ],
        cwd=folder,
        env=os.environ | {"SPARK_CONF_DIR": str(ROOT / "conf"), "PATH": _path()},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.ddp
def test_the_demo_ends_with_the_table_the_sum_the_dashboard_and_the_result(folder: Path) -> None:
    done = _submit(folder, *TINY, "--baseline", "true", "--output", "out/demo.json")

    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "out/demo.json"
    table = [line for line in lines if line.startswith("|")]
    assert "FGSM 2/255" in table[0]
    assert "PGD-2 2/255" in table[0]
    names = [row.replace("⚠ ", "").split()[1] for row in table[2:]]
    assert names == ["undefended", "defended"]
    assert any("files seen = " in line for line in lines)
    assert any("mlflow ui --backend-store-uri sqlite:" in line for line in lines)
    result = json.loads((folder / "out/demo.json").read_text())
    ingested = result["ingest"]
    outcomes = ("samples", "duplicates", "quarantined")
    assert ingested["files_seen"] == sum(ingested[outcome] for outcome in outcomes)
    assert result["baseline"]["mode"] == "standard"
    assert (result["world_size"], result["threads_per_rank"]) == (2, max(1, _cores() // 2))


@pytest.mark.slow
def test_the_built_in_data_are_split_alike_on_every_machine(folder: Path) -> None:
    (shards,) = folder.glob("build/demo/*/shards")

    rows = {name: split.rows for name, split in read_manifest(shards).splits.items()}

    assert rows == {"train": 47, "val": 15, "test": 18}


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.petastorm
def test_a_second_run_ingests_nothing_again_and_reads_through_petastorm(folder: Path) -> None:
    (said,) = folder.glob("build/demo/*/ingest.json")
    before = said.stat().st_mtime_ns

    done = _submit(folder, *TINY, "--data.reader", "petastorm", "--output", "out/second.json")

    assert done.returncode == 0, done.stderr[-3000:]
    assert said.stat().st_mtime_ns == before
    assert json.loads((folder / "out/second.json").read_text())["mode"] == "fused_noise"


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.ddp
def test_no_password_is_printed_or_left_behind(folder: Path) -> None:
    secrets = (
        *("--track.uri", "http://me:hunter2@127.0.0.1:9", "--track.patience_seconds", 0),
        *("--spark.settings.spark.our.secret", "hunter2"),
    )

    done = _submit(folder, *TINY, *secrets, "--output", "out/secret/done.json")

    assert done.returncode == 0, done.stderr[-3000:]
    assert "Dashboard: http://***@127.0.0.1:9" in done.stdout.splitlines()
    run = folder / "out/secret/done.run"
    # spark-submit sends what the job says to its own output
    assert f"python -m medspark.track --uri 'http://***@127.0.0.1:9' {run}" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    files = [path for path in (folder / "out/secret").rglob("*") if path.is_file()]
    assert {"done.json", "run.json", "result.json", "model.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    modes = {name: stat.S_IMODE((run / name).stat().st_mode) for name in ("attempts", "model")}
    assert modes["attempts"] == 0o700
    assert modes["model"] & 0o500 == 0o500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own, the first time that pyfunc is imported
def test_the_run_in_mlflow_is_complete_and_its_model_can_be_trained_on(folder: Path) -> None:
    result = json.loads((folder / "out/demo.json").read_text())
    reference = result["mlflow"]

    run = MlflowClient(reference["uri"]).get_run(reference["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["world_size"] == "2"
    assert run.data.params["model.name"] == "mobilenetv2_050"
    assert run.data.tags["medspark.dataset_digest"] == result["dataset_digest"]
    assert {"loss", "images_per_second", "data_wait_share", "test/pgd/eps_2_255/accuracy"} <= set(
        run.data.metrics
    )
    model = load_classifier(fetch_model(reference["model"], uri=reference["uri"]))
    assert same_tensors(model, load_classifier(Path(result["model"])))
    mlflow.set_tracking_uri(reference["uri"])
    images = np.zeros((2, 32, 32, 1), dtype=np.float32)
    assert mlflow.pyfunc.load_model(reference["model"]).predict(images).shape == (2, 2)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--train.epoch 3", "There is no key train.epoch; did you mean train.epochs?"),
        ("--shards /nowhere", "There is no shard folder /nowhere."),
        ("--shards {tmp}", "{tmp} holds no manifest.json: jobs/shard.py has not finished there."),
        (
            "--model.weights /nowhere.safetensors",
            "model.weights: cannot read '/nowhere.safetensors': No such file or directory.",
        ),
        (
            "--attack.eps 3/2",
            "attack.eps: the budget is a fraction of [0, 1], at most 64/255, so it cannot be 1.5;",
        ),
        (
            "--launch.processes 3 --spark.master local[2]",
            "launch.processes is 3, but Spark's master local[2] has 2 slots on this machine.",
        ),
        (
            "--launch.processes 2 --spark.master local[2] --train.batch_size 1",
            "train.batch_size 1 is too small: in every step some of the 2 processes have no image",
        ),
        (
            "--launch.processes 3 --spark.master local[3] --train.elastic exact",
            "train.virtual_shards 4 must be a power of two and a multiple of the 3 processes.",
        ),
        ("--config /nowhere.yaml", "The configuration file /nowhere.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_spark_starts(
    job: ModuleType,
    argv: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "spark_session", _too_late)
    monkeypatch.chdir(tmp_path)

    status = job.main(argv.format(tmp=tmp_path).split())

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith("train_at: " + sentence.format(tmp=tmp_path))
    assert "\n" not in said


@pytest.mark.usefixtures("no_session")
def test_a_decision_between_more_than_two_is_one_sentence_before_spark_starts(
    job: ModuleType,
    tmp_path: Path,
    write_shards: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "spark_session", _too_late)
    shards, run = write_shards(findings=3), tmp_path / "run"

    status = job.main(f"--shards {shards} --run_dir {run} --decision.sensitivity 0.95".split())

    assert status == 2
    assert capsys.readouterr().err.strip() == (
        "train_at: decision: a threshold needs two classes, and there are 3 findings."
    )


@pytest.mark.usefixtures("no_session")
def test_a_network_that_timm_does_not_have_is_one_sentence_and_status_2(
    job: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # It is told while Spark starts, which takes as long as to import timm.
    monkeypatch.setattr(training, "spark_session", lambda *_, **__: nullcontext())
    monkeypatch.chdir(tmp_path)

    status = job.main(["--model.name", "mobilnetv2_100", "--run_dir", str(tmp_path / "run")])

    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.startswith(
        "train_at: model.name: timm has no model 'mobilnetv2_100'; did you mean mobilenetv2_100"
    )
    assert "\n" not in said


def _too_late(*_: object, **__: object) -> Callable[..., None]:
    raise AssertionError("Spark was started")


def test_help_lists_every_key(job: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job.main(["--help"])

    shown = capsys.readouterr().out
    for key in ("--shards", "--attack.eps", "--launch.processes", "--data.reader", "--resume"):
        assert key in shown
