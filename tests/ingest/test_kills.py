"""After a worker or driver is killed during ingest, the dataset is the old or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow.parquet as pq
import pytest
from archive_runs import wait_for
from key_files import write_key

from medspark.images.deidentify import Privacy
from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def archive(tmp_path: Path) -> ArchiveSummary:
    write_key(tmp_path / "key", "kills")
    return write_archive(tmp_path / "in", PhantomConfig(count=300, size=128))


def run(spark: SparkSession, folder: Path, key: ArchiveSummary) -> dict[str, Any]:
    config = IngestConfig(
        source=key.folder,
        labels=key.labels,
        samples=str(folder / "samples"),
        image_size=16,
        privacy=Privacy(key_file=folder / "key"),
    )
    return ingest(spark, open_archive(config))


def check_whole(samples: Path, key: ArchiveSummary, result: dict[str, Any]) -> None:
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    rows = [row for file in manifest.ledger for row in pq.read_table(samples / file).to_pylist()]
    live = [(row["part"], row["row"]) for row in rows if row["outcome"] == "sample"]
    assert len(live) == len(set(live)) == result["samples"] == key.images
    assert len({row["file_key"] for row in rows}) == result["files_seen"] == key.files
    stored = {part.path: pq.read_metadata(samples / part.path).num_rows for part in manifest.parts}
    assert stored == {part.path: part.rows for part in manifest.parts}


def test_a_killed_worker_costs_its_task_a_retry_and_no_row_is_lost_or_doubled(
    spark, archive, tmp_path
):
    results: list[dict[str, Any]] = []
    ingesting = threading.Thread(target=lambda: results.append(run(spark, tmp_path, archive)))
    ingesting.start()
    wait_for((tmp_path / "samples" / "staging" / "outcomes").exists)

    worker = wait_for(_busy_worker)
    worker.kill()
    ingesting.join(120)

    assert len(results) == 1
    check_whole(tmp_path / "samples", archive, results[0])


def _busy_worker() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        try:
            parent = process.parent()
            # The decoder is a child of the worker, which is a child of Spark's daemon.
            # This process may have decoders from earlier tests.
            if "medspark.images.guard" not in process.cmdline() or parent is None:
                continue
            if "pyspark.daemon" in parent.cmdline():
                return parent
        except psutil.Error:
            continue
    return None


# make chaos ONLY=C13 kills at five moments, and also an executor.
@pytest.mark.parametrize("moment", ["staging/outcomes", "ledger"])
def test_a_killed_driver_leaves_no_dataset_and_the_next_run_starts_clean(
    spark, archive, tmp_path, moment
):
    samples = tmp_path / "samples"
    command = [
        *(sys.executable, "jobs/ingest.py", "--source", archive.folder),
        *("--labels", archive.labels, "--samples", str(samples), "--image_size", "16"),
        *("--privacy.key_file", str(tmp_path / "key"), "--spark.master", "local[2]"),
        *("--output", str(tmp_path / "result.json")),
    ]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for((samples / moment).exists)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()

    assert not (samples / "manifest.json").exists()
    result = run(spark, tmp_path, archive)

    check_whole(samples, archive, result)
    named = {part.path for part in SampleSet(str(samples)).manifest().parts}  # type: ignore[union-attr]
    assert {str(p.relative_to(samples)) for p in (samples / "data").rglob("*.parquet")} == named
    assert not (samples / "staging").exists()
