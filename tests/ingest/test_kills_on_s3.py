"""An ingest into an object store that is killed loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from archive_runs import wait_for
from key_files import write_key

from medspark import storage
from medspark.errors import UsageError
from medspark.images.deidentify import Privacy
from medspark.images.phantom import ArchiveSummary, PhantomConfig, write_archive
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def archive(tmp_path: Path) -> ArchiveSummary:
    write_key(tmp_path / "key", "kills")
    return write_archive(tmp_path / "in", PhantomConfig(count=300, size=64))


def run(spark: Any, key: ArchiveSummary, samples: str, folder: Path) -> dict[str, Any]:
    config = IngestConfig(
        source=key.folder,
        labels=key.labels,
        samples=samples,
        image_size=16,
        privacy=Privacy(key_file=folder / "key"),
    )
    return ingest(spark, open_archive(config))


def expire(samples: str) -> None:
    """Let the lease of a killed job run out, as it does by itself after a minute."""
    lease = json.loads(storage.read_text(f"{samples}/.lease") or "")
    storage.write_text(f"{samples}/.lease", json.dumps(lease | {"expires": time.time() - 1}))


def check_whole(samples: str, key: ArchiveSummary, result: dict[str, Any]) -> None:
    manifest = SampleSet(samples).manifest()
    assert manifest
    system, place = storage.filesystem(samples)
    rows = [
        row
        for file in manifest.ledger
        for row in pq.read_table(f"{place}/{file}", filesystem=system).to_pylist()
    ]
    live = [(row["part"], row["row"]) for row in rows if row["outcome"] == "sample"]
    assert len(live) == len(set(live)) == result["samples"] == key.images
    assert len({row["file_key"] for row in rows}) == result["files_seen"] == key.files
    assert {system.size(f"{place}/{part.path}") == part.bytes for part in manifest.parts} == {True}
    found = {name[len(place) + 1 :] for name in system.find(place)}
    assert {n for n in found if n.startswith("data/")} == {part.path for part in manifest.parts}
    assert not any(name.startswith("staging/") for name in found)


@pytest.mark.parametrize("moment", ["data", "ledger"])
def test_a_killed_driver_leaves_no_dataset_and_the_next_run_takes_over(
    s3_spark, archive, bucket, tmp_path, moment
):
    samples = f"{bucket}/samples"
    command = [
        *(sys.executable, "jobs/ingest.py", "--source", archive.folder),
        *("--labels", archive.labels, "--samples", samples, "--image_size", "16"),
        *("--privacy.key_file", str(tmp_path / "key"), "--spark.master", "local[2]"),
        *("--output", str(tmp_path / "result.json")),
    ]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        # The server is one process of Python: asked all the time, it would answer nobody else.
        wait_for(lambda: storage.is_folder(f"{samples}/{moment}"), 300, pause=0.2)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()

    assert SampleSet(samples).manifest() is None
    with pytest.raises(UsageError, match=f"process {driver.pid} on .*; its lease ends"):
        run(s3_spark, archive, samples, tmp_path)
    expire(samples)
    result = run(s3_spark, archive, samples, tmp_path)

    check_whole(samples, archive, result)
