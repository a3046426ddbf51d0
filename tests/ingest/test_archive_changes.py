"""What an ingest makes of changed archives, and of a job that is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pydicom.data
import pytest
from archive_runs import live, put, quarantine, values
from key_files import write_key

from medspark.images.deidentify import Pseudonyms
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.spark


def test_new_changed_and_deleted_files_are_told_apart(run, tmp_path):
    source, samples = tmp_path / "in %20", tmp_path / "out put"
    put(source, A__one=1, A__two=2, B__three=3)
    (source / "B" / "bad").write_bytes(b"")
    run(source, samples)
    (source / "B" / "bad").unlink()
    put(source, A__four=4, B__three=30)
    os.utime(source / "B" / "three", ns=(1, 1))
    (source / "A" / "two").unlink()

    dry = run(source, samples, dry_run=True)
    unchanged_by_it = values(samples)
    result = run(source, samples)

    counts = {"new": 1, "changed": 1, "unchanged": 1, "deleted": 2}
    assert {name: dry[name] for name in counts} == counts
    assert unchanged_by_it == [("A", 1), ("A", 2), ("B", 3)]
    assert {name: result[name] for name in counts} == counts
    assert (result["added"], result["removed"], result["files_seen"]) == (2, 1, 3)
    # A sample stays when its file is deleted.
    assert values(samples) == [("A", 1), ("A", 2), ("A", 4), ("B", 30)]


def test_equal_pixels_are_kept_once_and_under_two_labels_not_at_all(run, tmp_path):
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1, A__copy=1, A__torn=2, B__torn=2, train__A__x=5, test__A__x=5)

    result = run(source, samples)

    assert (result["samples"], result["duplicates"], result["quarantined"]) == (2, 2, 2)
    assert result["quarantine_reasons"] == {"conflicting_label": 2}
    assert result["cross_patient_duplicates"] == 2
    assert [row["split"] for row in live(samples).values() if row["pixels"][0] == 5] == ["test"]
    # When the original changes, its copy becomes the sample.
    kept = next(name for name in ("one", "copy") if not _is_duplicate(samples, 1, name))
    put(source, **{f"A__{kept}": 9})
    os.utime(source / "A" / kept, ns=(1, 1))
    assert run(source, samples)["duplicates"] == 1
    assert values(samples) == [("A", 1), ("A", 5), ("A", 9)]


def _is_duplicate(samples: Path, value: int, name: str) -> bool:
    source, key_file = samples.parent / "in", write_key(samples.parent / "key", "archive")
    secret = bytes.fromhex(key_file.read_text())
    key = Pseudonyms(secret).name("file", f"{source}/A/{name}")
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    rows = [row for file in manifest.ledger for row in pq.read_table(samples / file).to_pylist()]
    return any(row["file_key"] == key and row["outcome"] == "duplicate" for row in rows)


@pytest.mark.parametrize("order", [("val", "train"), ("train", "val"), ("train", "test", "val")])
def test_a_file_that_is_listed_under_two_splits_is_held_out(run, tmp_path, order):
    put(tmp_path / "in", A__x=1)
    lines = ["path,label,split", "A/x,A,", *(f"A/x,A,{split}" for split in order)]
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")

    run(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "labels.csv"))

    (row,) = live(tmp_path / "out").values()
    assert row["split"] == ("test" if "test" in order else "val")


def test_a_file_that_is_listed_under_two_labels_is_not_a_sample(run, tmp_path):
    put(tmp_path / "in", x=1, y=2, z=3)
    table = "path,label\nx,A\nx,B\ny,B\ny,B\nz,A\nz,\n"
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")

    result = run(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "labels.csv"))

    assert result["quarantine_reasons"] == {"conflicting_label": 1}
    assert values(tmp_path / "out") == [("A", 3), ("B", 2)]


def test_a_link_out_of_the_source_is_quarantined_and_what_it_gave_before_stays(run, tmp_path):
    source, samples, other = tmp_path / "in", tmp_path / "out", tmp_path / "other"
    put(other, one=1, folder__two=2, three=3)
    put(source, A__four=4)
    (source / "A" / "link").symlink_to(other / "one")
    (source / "A" / "folder").symlink_to(other / "folder")
    run(source, samples, limits={"follow_links": True})
    before = values(samples)
    put(other, one=9)
    (source / "A" / "new").symlink_to(other / "three")

    result = run(source, samples)

    assert before == values(samples) == [("A", 1), ("A", 2), ("A", 4)]
    assert result["quarantine_reasons"] == {"link_outside": 2}
    assert (result["files_seen"], result["samples"], result["removed"]) == (4, 2, 0)
    assert run(source, samples)["changed"] == 0
    assert run(source, samples, limits={"follow_links": True})["quarantined"] == 0
    assert values(samples) == [("A", 2), ("A", 3), ("A", 4), ("A", 9)]


def test_a_second_archive_is_added_beside_the_first(run, tmp_path):
    samples = tmp_path / "out"
    put(tmp_path / "one", A__x=1)
    put(tmp_path / "two", A__x=2, B__bad=3)
    (tmp_path / "two" / "B" / "bad").write_bytes(b"")

    run(tmp_path / "one", samples)
    second = run(tmp_path / "two", samples)
    shutil.rmtree(tmp_path / "one" / "A")
    put(tmp_path / "one", A__y=9)
    third = run(tmp_path / "one", samples)

    assert (second["samples"], second["quarantined"], second["deleted"]) == (1, 1, 0)
    assert (third["files_seen"], third["deleted"], third["added"]) == (1, 1, 1)
    assert values(samples) == [("A", 1), ("A", 2), ("A", 9)]
    assert set(quarantine(samples)) == {str(tmp_path / "two" / "B" / "bad")}


def test_a_file_of_many_frames_counts_once(run, tmp_path):
    found = pydicom.data.get_testdata_file("SC_rgb_rle_2frame.dcm", download=False)
    (tmp_path / "in" / "A").mkdir(parents=True)
    for name in ("one", "copy"):
        shutil.copy(str(found), tmp_path / "in" / "A" / name)

    result = run(tmp_path / "in", tmp_path / "out")

    counts = {"files_seen": 2, "samples": 1, "duplicates": 1, "frames": 2, "patients": 1}
    assert {name: result[name] for name in counts} == counts
    assert len(live(tmp_path / "out")) == 2


class _Killed(BaseException):
    """Stands for SIGKILL: code that catches Exception does not catch it."""


@contextmanager
def _dying(
    monkeypatch: pytest.MonkeyPatch, target: type, method: str, *, after: bool
) -> Iterator[None]:
    whole = getattr(target, method)

    def die(*args: Any, **kwargs: Any) -> Any:
        if after:
            whole(*args, **kwargs)
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(target, method, die)
        yield


@pytest.mark.parametrize("after", [False, True])
def test_whoever_dies_around_the_commit_leaves_one_whole_dataset(run, tmp_path, monkeypatch, after):
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1)
    run(source, samples)
    put(source, A__two=2)

    with _dying(monkeypatch, SampleSet, "commit", after=after):
        run(source, samples)

    assert values(samples) == ([("A", 1), ("A", 2)] if after else [("A", 1)])
    assert run(source, samples)["added"] == (0 if after else 1)
    assert values(samples) == [("A", 1), ("A", 2)]
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    named = {part.path for part in manifest.parts}
    assert {str(p.relative_to(samples)) for p in (samples / "data").rglob("*.parquet")} == named
