"""Ingest of an archive: complete counts, repeatable results, and no names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_runs import live, put, quarantine, values
from key_files import write_key

from medspark.errors import UsageError
from medspark.images.phantom import CANARY
from medspark.images.reasons import Reason
from medspark.ingest.sample_set import SampleSet

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.spark


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
