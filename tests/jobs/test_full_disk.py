"""A disk that is full: one sentence, and its room is given back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from job_calls import Call, files, write_classes
from small_disk import small_disk

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.mark.spark
def test_a_disk_that_is_full_while_evaluating_is_one_sentence_and_the_next_call_goes_on(
    spark: SparkSession, call: Call, tmp_path: Path, capsys
) -> None:
    words = ("--attacks", "fgsm", "--eps", "2/255", "--bootstrap", "5", "--gallery", "0")
    with small_disk(tmp_path / "disk", 96 << 10) as mounted:
        if not mounted:
            pytest.skip("this machine does not let us mount a small disk")
        target = tmp_path / "disk" / "target"
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(ballast.parent).free - (24 << 10)))

        status = call("evaluate", target, *words, "--piece", "2")

        said = capsys.readouterr().err
        assert status == 1
        assert "Traceback" not in said
        assert "No space left" in said or "disk is full" in said
        assert not list(target.rglob(".piece*"))


@pytest.mark.spark
def test_a_disk_that_is_full_while_ingesting_has_its_room_back(
    spark: SparkSession, call: Call, tmp_path: Path, capsys
) -> None:
    archive = write_classes(tmp_path / "archive", images=80)
    with small_disk(tmp_path / "disk", 300 << 10) as mounted:
        if not mounted:
            pytest.skip("this machine does not let us mount a small disk")
        samples = tmp_path / "disk" / "samples"

        status = call("ingest", samples, "--source", archive, "--image_size", "128")

        said = capsys.readouterr().err
        assert status == 1
        assert "No space left" in said
        assert "Traceback" not in said
        assert {name for name in files(samples) if not name.startswith(".")} == set()
