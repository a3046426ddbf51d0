"""A local MLflow store is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medspark.track.local_store import open_store

OPEN = "import sys; from medspark.track.local_store import open_store; open_store(sys.argv[1])"


def start(uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", OPEN, uri])


@pytest.mark.slow
def test_a_store_whose_creator_was_killed_can_be_opened(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    creator = start(uri)
    while not any(each.stat().st_size > 400_000 for each in tmp_path.glob("*mlflow.db")):
        assert creator.poll() is None, "the store was opened"
        time.sleep(0.001)
    creator.send_signal(signal.SIGKILL)
    creator.wait()

    client = open_store(uri)

    run = client.create_run("0")
    assert [each.info.run_id for each in client.search_runs(["0"])] == [run.info.run_id]


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_share_it(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert [each.wait() for each in [start(uri) for _ in range(3)]] == [0, 0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["mlflow.db"]


def test_an_existing_store_keeps_its_runs(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = open_store(uri).create_run("0")
    assert open_store(uri).get_run(run.info.run_id).info.run_id == run.info.run_id


def test_a_file_system_without_hard_links_gets_a_store_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)

    open_store(f"sqlite:///{tmp_path / 'mlflow.db'}").create_run("0")

    assert [each.name for each in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    open_store("sqlite:///:memory:").create_run("0")

    assert not list(tmp_path.glob("*memory*"))
