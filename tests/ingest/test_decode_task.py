"""Outcomes of one decoding task, called without Spark."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.rendering import Rendering
from medspark.ingest import ledger
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.decode_task import DecodeFiles
from medspark.ingest.listing import Annotate
from medspark.ingest.npz import has_findings, list_images
from medspark.ingest.reading import ArchiveReader

PSEUDONYMS = Pseudonyms(b"k" * 32)


def png(value: int, size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def decoding(archive: Path, samples: Path, **values: Any) -> DecodeFiles:
    given: dict[str, Any] = {
        "source": str(archive),
        "run": "g",
        "rendering": Rendering(size=8),
        "limits": ArchiveLimits(),
        "privacy": Privacy(),
        "pseudonyms": PSEUDONYMS,
        "guarded": False,
    }
    reader = ArchiveReader(**(given | values))
    return DecodeFiles(reader, source_key="s", samples=str(samples), generation="g")


def annotated(source: Path, *paths: str, **known: Any) -> list[pa.RecordBatch]:
    listing = [
        {"path": path, "size": (source / path).stat().st_size, "modified": 0, **known}
        for path in paths
    ]
    annotate = Annotate(str(source), PSEUDONYMS, Privacy(), by_folder=not known)
    return list(annotate([pa.RecordBatch.from_pylist(listing)]))


def outcomes(decoding: DecodeFiles, batches: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in decoding(batches) for row in batch.to_pylist()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, content in {
        "A/one.png": png(1),
        "A/two": png(2),
        "B/empty.dcm": b"",
        "B/page.dcm": b"<html>not found</html>" * 20,
        "B/cut.png": png(3)[:40],
        "loose.png": png(4),
        "notes.txt": b"hello",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


PATHS = ["A/one.png", "A/two", "B/empty.dcm", "B/page.dcm", "B/cut.png", "loose.png", "notes.txt"]


@pytest.mark.parametrize("guarded", [False, True])
def test_every_file_is_a_sample_or_has_a_reason(source, tmp_path, guarded):
    rows = outcomes(decoding(source, tmp_path, guarded=guarded), annotated(source, *PATHS))

    *files, part = rows
    assert [(row["outcome"], row["reason"]) for row in files] == [
        ("sample", None),
        ("sample", None),
        ("quarantined", "empty_file"),
        ("quarantined", "not_an_image"),
        ("quarantined", "decode_failed"),
        ("quarantined", "no_label"),
        ("quarantined", "not_an_image"),
    ]
    assert part["part_rows"] == 2


def test_samples_lie_where_their_outcomes_say(source, tmp_path):
    one, two, part = outcomes(decoding(source, tmp_path), annotated(source, "A/one.png", "A/two"))

    table = pq.read_table(tmp_path / part["part"]).to_pylist()
    assert (one["part"], one["row"], two["row"]) == (part["part"], 0, 1)
    assert [row["sample_key"] for row in table] == [one["sample_key"], two["sample_key"]]
    assert [set(row["pixels"]) for row in table] == [{1}, {2}]
    assert {(row["height"], row["width"], row["channels"], row["bits"]) for row in table} == {
        (8, 8, 1, 8)
    }


def test_nothing_in_a_sample_tells_its_file(source, tmp_path):
    row, part = outcomes(decoding(source, tmp_path), annotated(source, "A/one.png"))

    stored = (tmp_path / part["part"]).read_bytes()
    assert b"one" not in stored
    assert str(source).encode() not in stored
    assert "one.png" not in repr({name: row[name] for name in ledger.SCHEMA.names})


def test_two_attempts_of_a_task_write_two_files(source, tmp_path):
    task, batches = decoding(source, tmp_path), annotated(source, "A/one.png")

    first, second = outcomes(task, batches), outcomes(task, batches)

    assert first[0]["part"] != second[0]["part"]
    assert first[0]["sample_key"] == second[0]["sample_key"]


def test_a_file_that_is_gone_by_now_is_unreadable(source, tmp_path):
    batches = annotated(source, "A/one.png")
    (source / "A" / "one.png").unlink()

    (row,) = outcomes(decoding(source, tmp_path), batches)

    assert row["reason"] == "unreadable_file"


def test_a_table_that_gives_two_labels_quarantines_the_file(source, tmp_path):
    batches = annotated(source, "A/one.png", label="A", conflict=True)

    (row,) = outcomes(decoding(source, tmp_path), batches)

    assert row["reason"] == "conflicting_label"


def test_a_file_beyond_the_limit_is_not_opened(source, tmp_path):
    task = decoding(source, tmp_path, limits=ArchiveLimits(file_bytes=10))

    (row,) = outcomes(task, annotated(source, "A/one.png"))

    assert (row["reason"], row["content_key"]) == ("too_large", None)


def test_a_patient_of_the_table_comes_before_the_header(source, tmp_path):
    known, _ = outcomes(
        decoding(source, tmp_path), annotated(source, "A/one.png", label="A", patient_key="p")
    )
    alone, other, _ = outcomes(
        decoding(source, tmp_path), annotated(source, "A/one.png", "A/two", label="A")
    )

    assert known["patient_key"] == "p"
    assert alone["patient_key"] != other["patient_key"]


def test_files_are_read_from_any_file_system(source, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe({"/bucket/A/one.png": png(9)})
    batches = annotated(source, "A/one.png")

    row, part = outcomes(decoding(source, tmp_path, source="memory://bucket"), batches)

    assert row["outcome"] == "sample"
    assert set(pq.read_table(tmp_path / part["part"])["pixels"][0].as_py()) == {9}


def test_the_images_of_a_medmnist_archive_are_files_of_their_own(tmp_path):
    arrays: dict[str, Any] = {}
    for split, count in (("train", 3), ("test", 2)):
        arrays[f"{split}_images"] = np.arange(count * 64, dtype=np.uint8).reshape(count, 8, 8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    listing = list_images(str(tmp_path / "m.npz"), ArchiveLimits())
    annotate = Annotate(str(tmp_path / "m.npz"), PSEUDONYMS, Privacy(), by_folder=False)

    *rows, part = outcomes(
        decoding(tmp_path / "m.npz", tmp_path), list(annotate(listing.to_batches()))
    )

    stored = pq.read_table(tmp_path / part["part"])
    assert [(row["label"], row["split"]) for row in rows] == [
        *[("0", "train"), ("1", "train"), ("0", "train")],
        *[("0", "test"), ("1", "test")],
    ]
    assert stored["pixels"][2].as_py() == arrays["train_images"][2].tobytes()


@pytest.mark.parametrize("several", [True, False])
def test_an_archive_whose_images_have_several_findings_lists_them(tmp_path, several):
    labels = np.zeros((3, 14 if several else 1), dtype=np.uint8)
    labels[1:, 0] = labels[2, -1] = 1
    images = np.zeros((3, 8, 8), dtype=np.uint8)
    np.savez_compressed(tmp_path / "m.npz", train_images=images, train_labels=labels)

    listed = list_images(str(tmp_path / "m.npz"), ArchiveLimits())["label"].to_pylist()

    assert listed == (["", "00", "00|13"] if several else ["0", "1", "1"])
    assert has_findings(str(tmp_path / "m.npz"), ArchiveLimits()) == several


_COUNT_FAULTS = """
import resource, sys
import pyarrow as pa
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.rendering import Rendering
from medspark.ingest.decode_task import DecodeFiles
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.reading import ArchiveReader

names = Pseudonyms(b"k" * 32)
reader = ArchiveReader(
    source=sys.argv[1], run="g", rendering=Rendering(size=64), limits=ArchiveLimits(),
    privacy=Privacy(), pseudonyms=names, guarded=False,
)
decoding = DecodeFiles(reader, source_key="s", samples=sys.argv[1] + "/samples", generation="g")
row = dict.fromkeys(("split", "site")) | {"sealed_path": names.seal("x.png"), "size": 9}
row |= {"label": "a", "patient_key": "p", "conflict": False, "file_key": "f", "fingerprint": "f"}
batch = pa.RecordBatch.from_pylist([row] * 20)
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert list(decoding([batch]))[0]["outcome"].to_pylist() == ["sample"] * 20
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1] / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no C library that can keep memory")
def test_a_worker_asks_the_kernel_for_no_pages_that_it_had_for_the_file_before(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, (512, 512), dtype=np.uint16)
    Image.fromarray(noise).save(tmp_path / "x.png")
    command = [sys.executable, "-c", _COUNT_FAULTS, str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    # One float32 array of 512 x 512 pixels takes 256 pages, and decoding needs several.
    assert float(done.stdout) < 100
