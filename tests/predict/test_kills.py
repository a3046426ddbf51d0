"""After a worker or driver is killed during a prediction, every file has one row in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prediction_runs import by_path

from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.predict.folder import PredictionFolder

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def archive(tmp_path: Path) -> ArchiveSummary:
    return write_archive(tmp_path / "in", PhantomConfig(count=300, size=128))


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise TimeoutError


def test_a_killed_driver_is_resumed_from_the_files_that_its_tasks_had_finished(
    run, archive, settings, tmp_path
):
    answers = tmp_path / "answers"
    given = settings(archive.folder, answers)
    command = [sys.executable, "jobs/predict.py", "--spark.master", "local[2]"]
    for name in ("model", "source", "answers", "paths_file"):
        command += [f"--{name}", str(given[name])]
    command += ["--privacy.key_file", str(given["privacy"]["key_file"])]
    driver = subprocess.Popen(
        [*command, "--output", str(tmp_path / "result.json")], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = PredictionFolder(str(answers))
    wait_for(folder.finished)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finished = folder.finished()

    result = run(archive.folder, answers)

    assert result.files_found == archive.files + 1 == len(by_path(answers))
    assert result.done_before == finished > 0
    assert result.done_now == result.files_found - finished > 0


def test_a_killed_worker_costs_its_task_a_retry_and_no_row_is_lost_or_doubled(
    run, archive, tmp_path
):
    answers, results = tmp_path / "answers", []
    predicting = threading.Thread(target=lambda: results.append(run(archive.folder, answers)))
    predicting.start()
    wait_for((answers / "work").exists)

    worker = wait_for(_busy_worker)
    worker.kill()
    predicting.join(240)

    assert [result.files_found for result in results] == [archive.files + 1]
    assert len(by_path(answers)) == archive.files + 1


def _busy_worker() -> psutil.Process | None:
    """Return a worker of Spark whose decoder has just been started."""
    for process in psutil.Process().children(recursive=True):
        try:
            parent = process.parent()
            if "medspark.images.guard" not in process.cmdline() or parent is None:
                continue
            recent = time.time() - process.create_time() < 60  # not of an earlier test
            if recent and "pyspark.daemon" in parent.cmdline():
                return parent
        except psutil.Error:
            continue
    return None
