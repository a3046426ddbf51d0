"""train_at on a real cluster: ranks on executors whose Python does not have medspark."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from standalone import StandaloneCluster

from medspark.track.journal import JournalReader

pytestmark = [pytest.mark.slow, pytest.mark.spark, pytest.mark.ddp]

RECIPE = (
    *("--model.name", "mobilenetv2_050", "--train.batch_norm", "frozen", "--train.batch_size", 16),
    *("--train.precision", "fp32", "--evaluate.steps", 1, "--evaluate.sanity_images", 0),
    # A rate at which sums in another order, and signs that flip for it, do not build up.
    *("--train.validation_steps", 1, "--train.lr", 1e-5),
)


@pytest.fixture
def shards(write_shards: Callable[..., Path]) -> Path:
    return write_shards(rows=64, side=32)


def _losses(run_dir: Path) -> list[float]:
    records = JournalReader(run_dir / "journal").poll()
    return [record.metrics["loss"] for record in records if "loss" in record.metrics]


def test_the_workers_do_not_have_medspark(cluster: StandaloneCluster) -> None:
    probe = [cluster.python, "-c", "import torch, pyspark, mlflow; import medspark"]

    found = subprocess.run(probe, cwd=cluster.folder, capture_output=True, text=True)

    assert "No module named 'medspark'" in found.stderr


def test_two_ranks_on_executors_train_as_one_process_does(
    cluster: StandaloneCluster, shards: Path, tmp_path: Path
) -> None:
    train = ("--shards", shards, "--train.epochs", 2, *RECIPE)
    out = tmp_path / "result.json"
    job = cluster.submit(
        "train_at.py", *train, "--launch.processes", 2, "--output", out, *_track(tmp_path)
    )
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said[-3000:]
    alone = [sys.executable, "-m", "medspark.train", *train, "--run_dir", tmp_path / "alone"]
    subprocess.run(list(map(str, alone)), check=True, cwd=tmp_path, capture_output=True)

    result = json.loads(out.read_text())
    assert result["world_size"] == 2
    assert result["launch"]["on_executors"]
    two, one = _losses(tmp_path / "result.run"), _losses(tmp_path / "alone")
    assert len(two) == len(one) == 8
    assert two == pytest.approx(one, rel=1e-4)


def test_a_killed_rank_ends_the_job_and_is_named(
    cluster: StandaloneCluster, shards: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        *("train_at.py", "--shards", shards, "--train.epochs", 2000, *RECIPE),
        *("--launch.processes", 2, "--output", tmp_path / "result.json", *_track(tmp_path)),
    )
    attempt = tmp_path / "result.run" / "attempts" / "0001"
    started = _wait_for(attempt / "rank-1.started.json")
    _wait_for(tmp_path / "result.run" / "journal" / "*.jsonl")
    os.kill(json.loads(started.read_text())["pid"], signal.SIGKILL)
    killed_at = time.monotonic()

    said, _ = job.communicate(timeout=120)  # spark-submit joins both outputs of Python into one

    assert job.returncode == 1
    assert re.search(r"failed: rank 1 on \S+ \(process \d+\) was killed by SIGKILL", said), said
    assert time.monotonic() - killed_at < 110
    assert not (tmp_path / "result.json").exists()


def _track(folder: Path) -> tuple[str, ...]:
    return ("--track.uri", f"sqlite:///{folder}/mlflow.db", "--track.system_metrics", "false")


def _wait_for(pattern: Path, *, seconds: float = 150) -> Path:
    deadline = time.monotonic() + seconds
    while not (found := sorted(pattern.parent.glob(pattern.name))):
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.1)
    return found[0]
