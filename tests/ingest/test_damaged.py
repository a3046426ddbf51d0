"""Damaged files end no worker of the job: each is an image, a duplicate, or in the quarantine."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pydicom.data
import pytest

from medspark.images.reasons import Reason
from medspark.ingest.archive import IngestConfig, ingest, open_archive

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

# MEDSPARK_FUZZ=50000 ingests that many, in about two minutes.
COUNT = int(os.environ.get("MEDSPARK_FUZZ", "100"))
_EXTREMES = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0")


def _real_files() -> Iterator[bytes]:
    """Yield pydicom's own small files: many vendors, transfer syntaxes and faults."""
    for path in sorted(Path(pydicom.data.__file__).with_name("test_files").glob("*.dcm")):
        if path.stat().st_size < 200_000:
            yield path.read_bytes()


def _damaged(data: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        # Half of it hits the header, which is a small part of most files.
        at = chance.randrange(min(len(damaged), chance.choice((2000, len(damaged)))) or 1)
        kind = chance.choice(("byte", "extreme", "drop", "repeat", "cut"))
        if kind == "byte":
            damaged[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == "extreme":
            damaged[at : at + 4] = chance.choice(_EXTREMES)
        elif kind == "drop":
            del damaged[at : at + chance.randint(1, 40)]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + chance.randint(1, 40)]
        elif chance.random() < 0.2:  # not too often: what is cut off shows no other damage
            del damaged[at + 1 :]
    return bytes(damaged)


def _failed_tasks(spark: SparkSession) -> int:
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(False)
    return sum(executors.apply(index).failedTasks() for index in range(executors.size()))


def test_damaged_files_end_no_worker_and_all_of_them_are_accounted_for(
    spark: SparkSession, tmp_path: Path
) -> None:
    whole, chance = list(_real_files()), random.Random(0)
    for number in range(COUNT):
        folder = tmp_path / "archive" / f"label{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.dcm").write_bytes(_damaged(whole[number % len(whole)], chance))
    failed_before = _failed_tasks(spark)

    result = ingest(
        spark,
        open_archive(
            IngestConfig.model_validate(
                {
                    "source": str(tmp_path / "archive"),
                    "samples": str(tmp_path / "samples"),
                    "image_size": 16,
                }
            ),
            key=bytes(32),
        ),
    )

    print({key: value for key, value in result.items() if isinstance(value, int | dict)})
    assert _failed_tasks(spark) == failed_before
    accounted = result["samples"] + result["duplicates"] + result["quarantined"]
    assert accounted == result["files_seen"] == COUNT
    assert set(result["quarantine_reasons"]) <= {reason.value for reason in Reason}
    assert result["quarantine_reasons"].get(Reason.DECODE_TIMEOUT.value, 0) == 0
