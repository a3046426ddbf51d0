"""Damaged files crash no worker: each is an image, a duplicate, or quarantined with a reason."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydicom.data
import pytest
from pydicom import uid

from medspark.images.reasons import Reason
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.models.backbones import build
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig
from medspark.models.file_predictor import FilePredictor

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# MEDSPARK_FUZZ=10000 tries 10,000 files of each kind, in some minutes.
COUNT = int(os.environ.get("MEDSPARK_FUZZ", "100"))
_EXTREMES = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0")
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
# Every transfer syntax that a native library decodes, RLE, and the deflated syntax.
SYNTAXES = frozenset((
    uid.RLELossless, uid.DeflatedExplicitVRLittleEndian, uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless,
    uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL, uid.HTJ2K,
))  # fmt: skip
# Syntaxes without a file in pydicom's package, and the syntax whose streams replace them.
_SHARED = {
    uid.JPEGLossless: uid.JPEGLosslessSV1,
    uid.HTJ2KLossless: uid.JPEG2000Lossless,
    uid.HTJ2KLosslessRPCL: uid.JPEG2000Lossless,
    uid.HTJ2K: uid.JPEG2000,
}


def _real_files() -> Iterator[bytes]:
    """Yield pydicom's own small files: many vendors, transfer syntaxes and faults."""
    for path in sorted(Path(pydicom.data.__file__).with_name("test_files").glob("*.dcm")):
        if path.stat().st_size < 200_000:
            yield path.read_bytes()


def _compressed_files() -> dict[str, list[bytes]]:
    """Return pydicom's own compressed files, by transfer syntax."""
    found: dict[str, list[bytes]] = {}
    for path in sorted(Path(pydicom.data.__file__).with_name("test_files").rglob("*.dcm")):
        content = path.read_bytes()
        start = content[:1000].find(b"\x02\0\x10\0UI")
        length = int.from_bytes(content[start + 6 : start + 8], "little")
        syntax = content[start + 8 : start + 8 + length].rstrip(b"\0").decode("latin-1")
        if syntax in SYNTAXES and len(content) < 500_000:
            found.setdefault(syntax, []).append(content)
    for syntax, like in _SHARED.items():
        found.setdefault(syntax, [_renamed(content, like, syntax) for content in found[like]])
    return found


def _renamed(content: bytes, syntax: str, other: str) -> bytes:
    """Return a file with another transfer syntax (PS3.5 7.1.2: VR, length, value)."""
    old, new = (name.encode() + b"\0" * (len(name) % 2) for name in (syntax, other))
    return content.replace(
        b"UI" + len(old).to_bytes(2, "little") + old,
        b"UI" + len(new).to_bytes(2, "little") + new,
        1,
    )


def _damaged(data: bytes, chance: random.Random, *, first: int = 0) -> bytes:
    """Return ``data`` with one to four changes, none of them before byte ``first``."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        # Half of the changes hit the header, which is a small part of most files.
        end = min(len(damaged), first + chance.choice((2000, len(damaged))))
        at = chance.randrange(first, max(end, first + 1))
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


def _damaged_files(count: int) -> Iterator[bytes]:
    whole, chance = list(_real_files()), random.Random(0)
    for number in range(count):
        yield _damaged(whole[number % len(whole)], chance)


def _mutated_streams(count: int) -> Iterator[bytes]:
    """Yield files with a valid header and damaged pixels, in all syntaxes by turns."""
    by_syntax, chance = sorted(_compressed_files().items()), random.Random(0)
    for number in range(count):
        _, files = by_syntax[number % len(by_syntax)]
        content = chance.choice(files)
        start = content.find(_PIXEL_DATA) + 12 if _PIXEL_DATA in content else len(content) // 2
        mutated = bytearray(content)
        for _ in range(chance.choice((0, 1, 1, 2, 5, 30))):
            mutated[chance.randrange(start, len(mutated))] = chance.randrange(256)
        yield bytes(mutated) if chance.random() < 0.7 else _damaged(content, chance, first=start)


def _failed_tasks(spark: SparkSession) -> int:
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(False)
    return sum(executors.apply(index).failedTasks() for index in range(executors.size()))


def test_the_streams_are_of_all_transfer_syntaxes() -> None:
    assert _compressed_files().keys() == SYNTAXES


@pytest.mark.spark
@pytest.mark.parametrize("files", [_damaged_files, _mutated_streams])
def test_damaged_files_end_no_worker_and_all_of_them_are_accounted_for(
    spark: SparkSession, tmp_path: Path, files: Callable[[int], Iterator[bytes]]
) -> None:
    for number, content in enumerate(files(COUNT)):
        folder = tmp_path / "archive" / f"label{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.dcm").write_bytes(content)
    failed_before = _failed_tasks(spark)

    settings: dict[str, Any] = {
        "source": str(tmp_path / "archive"),
        "samples": str(tmp_path / "samples"),
        "image_size": 16,
    }
    archive = open_archive(IngestConfig.model_validate(settings), key=bytes(32))
    result = ingest(spark, archive)

    print({key: value for key, value in result.items() if isinstance(value, int | dict)})
    assert _failed_tasks(spark) == failed_before
    accounted = result["samples"] + result["duplicates"] + result["quarantined"]
    assert accounted == result["files_seen"] == COUNT
    assert set(result["quarantine_reasons"]) <= {reason.value for reason in Reason}
    # A random change may make decoding endless: then the time limit ends it.
    assert result["quarantine_reasons"].get(Reason.DECODE_TIMEOUT.value, 0) <= COUNT // 500


def test_a_served_model_answers_each_mutated_file_and_a_good_one_after_all_of_them(
    tmp_path: Path,
) -> None:
    network = build(ModelConfig(name="resnet10t"), num_classes=2, channels=1)
    save_classifier(tmp_path, network, describe(network, classes=("a", "b"), height=32, width=32))
    good = base64.b64encode(_compressed_files()[uid.JPEG2000][0]).decode()
    predictor = FilePredictor.load(tmp_path)
    (before,) = predictor([good])

    answers = []
    for content in _mutated_streams(COUNT):
        answers += predictor([base64.b64encode(content).decode()])

    crashed = sum("process crashed" in answer.get("error", "") for answer in answers)
    print(f"{crashed} of {COUNT} ended a decoder")
    assert all(("error" in answer) != ("label" in answer) for answer in answers)
    assert sum("label" in answer for answer in answers) > COUNT // 20
    assert predictor([good]) == [pytest.approx(before)]
    predictor.close()
