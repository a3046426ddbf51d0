"""Ingest of an archive: complete counts, repeatable results, and no names."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pydicom.data
import pytest
from key_files import write_key
from PIL import Image

from medspark.errors import UsageError
from medspark.images.deidentify import Pseudonyms
from medspark.images.phantom import CANARY, ArchiveSummary, PhantomConfig, write_archive
from medspark.images.reasons import Reason
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArchiveSummary]:
    folder = tmp_path_factory.mktemp("phantom") / "archive"
    return folder, write_archive(folder, PhantomConfig(count=120, size=32))


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("key") / "key", "archive")


@pytest.fixture(scope="session")
def run(spark: SparkSession, key_file: Path) -> Any:
    def run(source: Path, samples: Path, **values: Any) -> dict[str, Any]:
        config = {
            "source": str(source),
            "samples": str(samples),
            "image_size": 16,
            "privacy": {"key_file": key_file, "quarantine_file": listed(samples)},
            "guarded": False,
        }
        return ingest(spark, open_archive(IngestConfig.model_validate(config | values)))

    return run


@pytest.fixture(scope="session")
def ingested(
    run: Any, phantom: tuple[Path, ArchiveSummary], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    samples = tmp_path_factory.mktemp("ingested") / "samples"
    return samples, run(phantom[0], samples, labels=str(phantom[0] / "labels.csv"))


def live(samples: Path) -> dict[str, dict[str, Any]]:
    """Return the samples of the ledger, by key, with their pixels."""
    manifest = SampleSet(str(samples)).manifest()
    assert manifest
    parts = {part.path: pq.read_table(samples / part.path).to_pylist() for part in manifest.parts}
    rows = [row for file in manifest.ledger for row in pq.read_table(samples / file).to_pylist()]
    kept = [row for row in rows if row["outcome"] == "sample"]
    assert all(parts[row["part"]][row["row"]]["sample_key"] == row["sample_key"] for row in kept)
    return {row["sample_key"]: parts[row["part"]][row["row"]] for row in kept}


def listed(samples: Path) -> Path:
    """Return the path of a dataset's private quarantine list."""
    return samples.with_name(f"{samples.name}.csv")


def quarantine(samples: Path) -> dict[str, dict[str, Any]]:
    """Return the quarantine list's entries, by absolute path."""
    with listed(samples).open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_the_sum_is_the_answer_key(phantom, ingested):
    key, (_, result) = phantom[1], ingested

    assert result["files_seen"] == key.files
    assert result["files_seen"] == sum(
        result[name] for name in ("samples", "duplicates", "quarantined")
    )
    assert (result["samples"], result["duplicates"]) == (key.images, key.duplicates)
    assert result["quarantine_reasons"] == key.quarantine_reasons
    assert result["patients"] == key.patients
    assert result["labels"] == key.class_counts


def test_the_samples_are_as_many_as_are_said_and_of_one_size(ingested):
    samples, result = ingested

    rows = live(samples)

    assert len(rows) == result["frames"]
    assert {len(row["pixels"]) for row in rows.values()} == {16 * 16}


def test_the_quarantine_says_which_file_and_why(ingested):
    samples, result = ingested

    rows = quarantine(samples)

    assert len(rows) == result["quarantined"]
    assert all(Reason(row["reason"]) and row["message"] for row in rows.values())


def test_no_identifier_of_a_header_or_table_reaches_any_file(phantom, ingested):
    samples, _ = ingested
    planted = CANARY.encode()

    found = [path for path in samples.rglob("*") if path.is_file() and planted in _plain(path)]

    assert any(planted in path.read_bytes() for path in phantom[0].rglob("*") if path.is_file())
    assert found == []


def _plain(path: Path) -> bytes:
    """Return a file's bytes, and its decompressed values if it is Parquet."""
    content = path.read_bytes()
    return content + (
        repr(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else b""
    )


def test_a_second_run_adds_nothing_and_says_the_same_sum(phantom, ingested, run):
    samples, first = ingested
    before = (samples / "manifest.json").read_bytes()

    again = run(phantom[0], samples, labels=str(phantom[0] / "labels.csv"))

    assert (samples / "manifest.json").read_bytes() == before
    assert (again["added"], again["unchanged"]) == (0, first["files_seen"])
    for name in ("files_seen", "samples", "duplicates", "quarantine_reasons", "labels"):
        assert again[name] == first[name]


def test_another_rendering_or_key_does_not_mix_with_what_is_there(phantom, ingested, run, tmp_path):
    samples, _ = ingested
    labels = str(phantom[0] / "labels.csv")
    other = write_key(tmp_path / "key", "other")

    with pytest.raises(UsageError, match="rendered with size 16, not 24"):
        run(phantom[0], samples, labels=labels, image_size=24)
    with pytest.raises(UsageError, match="another pseudonym key"):
        run(phantom[0], samples, labels=labels, privacy={"key_file": other})


def test_on_a_driver_without_the_key_of_a_dataset_no_other_one_is_made(
    phantom, ingested, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(UsageError, match=r"key of \S+ is not at \S+: name it with"):
        run(phantom[0], ingested[0], labels=str(phantom[0] / "labels.csv"), privacy={})

    assert not list(tmp_path.iterdir())


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(value, value + 256, dtype=np.uint8).reshape(16, 16)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, **files: int) -> None:
    """Write images; ``A__x=3`` is the file A/x with image number 3."""
    for name, value in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))


def values(samples: Path) -> list[tuple[str, int]]:
    return sorted((row["label"], row["pixels"][0]) for row in live(samples).values())


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


def test_labels_come_from_a_coded_attribute(phantom, run, tmp_path):
    result = run(phantom[0], tmp_path / "out", labels="dicom:Modality")

    assert set(result["labels"]) <= {"CR", "DX"}
    assert result["samples"] > 0


def test_an_archive_of_arrays_is_ingested_with_its_splits(run, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (10, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (10, 1))
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)

    result = run(tmp_path / "mnist.npz", tmp_path / "out", image_size=28)

    rows = live(tmp_path / "out").values()
    assert (result["files_seen"], result["samples"]) == (30, 30)
    pixels = {row["pixels"] for row in rows if row["split"] == "val"}
    assert pixels == {image.tobytes() for image in arrays["val_images"]}


def test_an_archive_of_arrays_that_was_written_again_is_read_again(run, tmp_path):
    source, labels = tmp_path / "mnist.npz", np.arange(4)
    for value in (0, 100):
        images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8) // 8 + np.uint8(value)
        np.savez(source, train_images=images, train_labels=labels)
        os.utime(source, ns=(1, 1))
        run(source, tmp_path / "out", image_size=8)

    assert {row["pixels"] for row in live(tmp_path / "out").values()} == {
        image.tobytes() for image in images
    }


def test_an_inventory_that_leads_out_of_the_source_is_not_followed(run, tmp_path):
    put(tmp_path, in__A__one=1, secret=2)
    (tmp_path / "in" / "A" / "link").symlink_to(tmp_path / "secret")
    lines = ["path,size", "A/one,9", "A/link,9", "../secret,9"]
    (tmp_path / "inventory.csv").write_text("\n".join(lines), encoding="utf-8")

    result = run(tmp_path / "in", tmp_path / "out", inventory=str(tmp_path / "inventory.csv"))

    assert result["quarantine_reasons"] == {"link_outside": 2}
    assert values(tmp_path / "out") == [("A", 1)]


def test_a_folder_with_a_name_too_long_for_a_class_is_refused_before_anything_is_decoded(
    run, tmp_path
):
    put(tmp_path / "in", **{f"{'n' * 129}__x": 1})

    with pytest.raises(UsageError, match="A label has 129 characters"):
        run(tmp_path / "in", tmp_path / "out")

    assert SampleSet(str(tmp_path / "out")).manifest() is None


def test_an_inventory_takes_the_place_of_listing(run, tmp_path):
    source = tmp_path / "in"
    put(source, A__one=1, A__two=2)
    size = (source / "A" / "one").stat().st_size
    (tmp_path / "inventory.csv").write_text(
        f"path,size\n{source}/A/one,{size}\nA/gone,10\n", encoding="utf-8"
    )

    result = run(source, tmp_path / "out", inventory=str(tmp_path / "inventory.csv"))

    assert (result["files_seen"], result["samples"]) == (2, 1)
    assert result["quarantine_reasons"] == {"unreadable_file": 1}
