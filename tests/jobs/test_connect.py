"""The jobs on a Spark Connect session, from an archive to a robustness report."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job_calls import write_classes

ROOT = Path(__file__).parents[2]
TRAINING = [
    *("--model.name", "test_resnet", "--train.epochs", "1", "--train.batch_size", "8"),
    *("--train.batch_norm", "frozen", "--train.validation_steps", "1"),
    *("--train.monitor.action", "off", "--evaluate.steps", "1"),
    *("--evaluate.sanity_images", "0", "--launch.processes", "2", "--launch.where", "executors"),
]
PROBE = """
import psutil, sys
from medspark.spark.cluster import is_connect, is_local
from medspark.spark.session import SparkConfig, spark_session

for _ in range(2):
    with spark_session(SparkConfig()) as spark:
        assert is_connect(spark) and is_local(spark)
        here = psutil.Process()
        found = [c for p in (here, *here.children(recursive=True)) for c in p.net_connections()]
        print(*sorted({c.laddr.ip for c in found if c.status == "LISTEN"}))
        assert spark.range(3).count() == 3
"""


def connected(*command: object) -> str:
    """Return the output of Python with ``command``, on a Connect session of two cores."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"SPARK_REMOTE": "local[2]"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.spark
@pytest.mark.ddp
@pytest.mark.slow
def test_an_archive_becomes_a_robustness_report_through_spark_connect(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    store = f"sqlite:///{tmp_path}/mlflow.db"

    def run(job: str, *more: object) -> dict[str, Any]:
        output = tmp_path / f"{job}.json"
        connected(f"jobs/{job}.py", "--output", output, *more)
        return dict(json.loads(output.read_text()))

    samples, shards = tmp_path / "samples", tmp_path / "shards"
    source = write_classes(tmp_path / "source", images=32)
    key = tmp_path / "key"
    key.write_text(hashlib.sha256(b"connect").hexdigest())
    key.chmod(0o600)
    taken = run("ingest", "--source", source, "--samples", samples, "--privacy.key_file", key)
    cut = run("shard", "--samples", samples, "--shards", shards, "--size", 32)
    track = "--shards", shards, "--track.uri", store, "--track.system_metrics", "false"
    trained = run("train_at", *track, "--run_dir", tmp_path / "run", *TRAINING)
    attacked = run(
        "evaluate", *track, "--model", trained["model"], "--folder", tmp_path / "report",
        "--steps", 1, "--sanity_images", 0,
    )  # fmt: skip

    assert taken["samples"] == sum(split["rows"] for split in cut["splits"].values()) == 32
    assert trained["launch"]["on_executors"]
    assert attacked["clean"]["accuracy"] == trained["clean"]["accuracy"]


@pytest.mark.spark
@pytest.mark.slow
def test_the_server_of_a_connect_session_is_on_loopback_and_another_can_follow() -> None:
    pytest.importorskip("grpc")

    lines = connected("-W", "error::UserWarning", "-c", PROBE).splitlines()

    assert len(lines) == 2
    assert {word.removeprefix("::ffff:") for line in lines for word in line.split()} == {
        "127.0.0.1"
    }
