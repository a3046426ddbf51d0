"""jobs/ingest.py and jobs/shard.py as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medspark.images.phantom import CANARY, PhantomConfig, write_archive
from medspark.shards.manifest import read_manifest, verify

ROOT = Path(__file__).parents[2]


def call(
    *argv: object, program: str = sys.executable, folder: Path
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [program, *map(str, argv)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.spark
@pytest.mark.slow
def test_two_commands_turn_an_archive_into_shards_and_say_the_sum(tmp_path):
    key = write_archive(tmp_path / "in", PhantomConfig(count=60, size=32))
    submit = str(Path(sys.executable).parent / "spark-submit")

    ingested = call(
        "jobs/ingest.py", "--source", key.folder, "--labels", key.labels, "--image_size", 16,
        "--samples", tmp_path / "samples", "--output", tmp_path / "ingest.json",
        "--spark.master", "local[2]", program=submit, folder=tmp_path,
    )  # fmt: skip
    sharded = call(
        "jobs/shard.py", "--samples", tmp_path / "samples", "--shards", tmp_path / "shards",
        "--output", tmp_path / "shard.json", "--spark.master", "local[2]",
        program=submit, folder=tmp_path,
    )  # fmt: skip

    assert (ingested.returncode, sharded.returncode) == (0, 0), ingested.stderr + sharded.stderr
    result = json.loads((tmp_path / "ingest.json").read_text())
    assert result["files_seen"] == key.files
    assert result["samples"] == key.images
    assert f"{key.files} files seen = {key.images} samples + " in ingested.stdout
    manifest = read_manifest(tmp_path / "shards")
    verify(tmp_path / "shards", manifest)
    assert json.loads((tmp_path / "shard.json").read_text())["digest"] == manifest.digest
    # The key was made outside of the dataset, and said; nobody's name was.
    (made,) = (tmp_path / ".medspark" / "keys").iterdir()
    assert made.stat().st_mode & 0o777 == 0o600
    # spark-submit joins both outputs of Python into one.
    assert str(made) in ingested.stdout + ingested.stderr
    assert CANARY not in ingested.stdout + ingested.stderr + sharded.stdout + sharded.stderr
    # So was the list of the files in quarantine.
    (listed,) = (tmp_path / ".medspark" / "quarantine").iterdir()
    assert listed.stat().st_mode & 0o777 == 0o600
    assert result["quarantine_file"] == str(listed)
    assert str(listed) in ingested.stdout
    assert len(listed.read_text().splitlines()) == 1 + result["quarantined"]


@pytest.mark.parametrize(
    ("job", "argv", "said"),
    [
        ("ingest", ["--source", "{tmp}/no", "--samples", "{tmp}/s"], "no source folder"),
        ("ingest", ["--source", "{tmp}", "--samples", "{tmp}/s"], "should not lie inside"),
        ("ingest", ["--source", "{tmp}/empty", "--samples", "{tmp}/s"], "no class folders"),
        ("ingest", ["--sorce", "x"], "did you mean source"),
        (
            "ingest",
            ["--source", "{tmp}/in", "--samples", "{tmp}/s", "--labels", "{tmp}/labels.csv"],
            "matches no file",
        ),
        (
            "ingest",
            ["--source", "{tmp}/in", "--samples", "{tmp}/s", "--labels", "dicom:PatientName"],
            "cannot be a label",
        ),
        ("shard", ["--samples", "{tmp}/no", "--shards", "{tmp}/t"], "no sample folder"),
        ("shard", ["--samples", "{tmp}/in", "--shards", "{tmp}/t"], "has not finished"),
        (
            "shard",
            ["--samples", "{tmp}/in", "--shards", "{tmp}/t", "--split.val", "0.9"],
            "nothing to train on",
        ),
    ],
)
def test_misuse_is_one_sentence_and_status_2_before_spark_starts(tmp_path, job, argv, said):
    (tmp_path / "in" / "A").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text("path,label\nnowhere.png,A\n")

    done = call(
        f"jobs/{job}.py", *[word.format(tmp=tmp_path) for word in argv], "--output",
        tmp_path / "out.json", folder=tmp_path,
    )  # fmt: skip

    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()
