"""Training shards: every sample once, disjoint patients, equal files, repeatable."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_shards import write_arrays
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from medspark.config import load_config
from medspark.errors import RunError, UsageError
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.ingest import ledger
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.sharding import assignment
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.sharding.layout import Counts, Layout
from medspark.sharding.reshape import bring_to, clean_shards
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.schema import PixelFormat, map_pixels

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@given(st.dictionaries(st.sampled_from(["train", "val", "test"]), st.integers(0, 500)))
def test_a_layout_deals_rows_to_files_that_differ_by_one_at_most(rows):
    counts = {name: Counts(count, (count,), 1) for name, count in rows.items()}

    layout = Layout.of(counts, PixelFormat(4, 4, 1, 8), shard_bytes=40 * 16)

    for name, count in rows.items():
        files = Counter(layout.bucket(name, position) for position in range(count))
        assert sorted(files) == list(layout.buckets(name))
        assert max(files.values(), default=0) <= min(40, min(files.values(), default=0) + 1)


def image(size: int, channels: int, bits: int) -> dict[str, Any]:
    pixels = np.full((size, size, channels), 200 if bits == 8 else 200 * 257, f"<u{bits // 8}")
    return {
        "height": size,
        "width": size,
        "channels": channels,
        "bits": bits,
        "pixels": pixels.tobytes(),
    }


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("stored", [(8, 1, 8), (8, 3, 8), (8, 1, 16), (8, 3, 16)])
def test_samples_are_brought_to_one_format(stored, size, channels, bits):
    bits = min(bits, stored[2])  # samples are never made deeper

    pixels = bring_to(PixelFormat(size, size, channels, bits), image(*stored))

    values = np.frombuffer(pixels, f"<u{bits // 8}")
    assert values.size == size * size * channels
    assert set(values.tolist()) == {200 if bits == 8 else 200 * 257}


def test_making_images_smaller_averages():
    board = np.indices((8, 8)).sum(0) % 2 * 255
    sample = image(8, 1, 8) | {"pixels": board.astype(np.uint8).tobytes()}

    small = np.frombuffer(bring_to(PixelFormat(4, 4, 1, 8), sample), np.uint8)

    assert abs(small.astype(int) - 127).max() <= 20  # aliasing would leave black or white


@pytest.fixture(scope="session")
def samples(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("for-shards")
    write_archive(folder / "in", PhantomConfig(count=100, size=32, seed=5))
    config = IngestConfig(
        source=str(folder / "in"),
        labels=str(folder / "in" / "labels.csv"),
        samples=str(folder / "out"),
        image_size=16,
        guarded=False,
    )
    ingest(spark, open_archive(config, key=b"\x22" * 32))
    return folder / "out"


def shard(spark: SparkSession, samples: Path, shards: Path, *argv: str) -> Manifest:
    config = load_config(ShardConfig, ["--samples", str(samples), "--shards", str(shards), *argv])
    make_shards(spark, config, open_samples(config))
    return read_manifest(shards)


def columns(shards: Path, split: str, *names: str) -> list[Any]:
    manifest = read_manifest(shards)
    tables = [
        pq.read_table(shards / s.path, columns=list(names)) for s in manifest.splits[split].shards
    ]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


@pytest.mark.spark
def test_every_sample_is_in_one_split_once_and_no_patient_in_two(spark, samples, tmp_path):
    manifest = shard(spark, samples, tmp_path, "--shard_bytes", "2600")

    verify(tmp_path, manifest)
    rows = {name: columns(tmp_path, name, "sample_key", "patient_key") for name in manifest.splits}
    stored = open_samples(ShardConfig.model_validate({"samples": str(samples), "shards": tmp_path}))
    assert len({row for split in rows.values() for row in split}) == stored.counts["frames"]
    patients = [{patient for _, patient in split} for split in rows.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    assert manifest.leak_check["patients_in_two_splits"] == 0
    for split in manifest.splits.values():
        sizes = [s.rows for s in split.shards]
        assert sum(sizes) == split.rows == sum(split.class_counts)
        assert max(sizes) - min(sizes) <= 1
    assert len(manifest.splits["train"].shards) > 3


@pytest.mark.spark
def test_pixels_labels_and_order_survive_the_way(spark, samples, tmp_path):
    manifest = shard(spark, samples, tmp_path)

    (file,) = manifest.splits["train"].shards
    mapped = np.concatenate(map_pixels(tmp_path / file.path, manifest.pixel_format))
    rows = columns(tmp_path, "train", "sample_key", "label")
    by_key = {
        row["sample_key"]: row
        for part in (samples / "data").rglob("*.parquet")
        for row in pq.read_table(part).to_pylist()
    }
    for pixels, (key, label) in zip(mapped, rows, strict=True):
        assert pixels.tobytes() == by_key[key]["pixels"]
        assert manifest.classes[label] == by_key[key]["label"]
    order = [hashlib.sha256(f"0\n{key}".encode()).hexdigest() for key, _ in rows]
    assert order == sorted(order)


@pytest.mark.spark
def test_the_same_samples_give_the_same_digest_and_leave_one_generation(spark, samples, tmp_path):
    first = shard(spark, samples, tmp_path)
    second = shard(spark, samples, tmp_path)
    other = shard(spark, samples, tmp_path, "--seed", "1")

    assert first.digest == second.digest != other.digest
    assert [path.name for path in (tmp_path / "data").iterdir()] == [other.generation]


@pytest.mark.spark
def test_shards_can_be_smaller_and_in_colour_and_of_some_classes(spark, samples, tmp_path):
    argv = ["--size", "8", "--channels", "3", "--classes", '["pneumonia"]']
    names = open_samples(
        ShardConfig.model_validate({"samples": str(samples), "shards": tmp_path})
    ).counts
    label = _labels(samples)[0]

    manifest = shard(spark, samples, tmp_path, *argv[:4], "--classes", f'["{label}"]')

    assert manifest.pixel_format == PixelFormat(8, 8, 3, 8)
    assert manifest.classes == (label,)
    assert sum(split.rows for split in manifest.splits.values()) < names["frames"]


def _labels(samples: Path) -> list[str]:
    tables = [
        pq.read_table(path, columns=["label"]) for path in (samples / "data").rglob("*.parquet")
    ]
    return sorted({label for table in tables for label in table["label"].to_pylist()})


@pytest.mark.spark
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "32"], "16 x 16"),
        (["--bits", "16"], "8 bits"),
        (["--classes", '["nonsense"]'], "'nonsense'"),
        (["--split.test", "0"], "test split is empty"),
    ],
)
def test_what_the_samples_cannot_give_is_refused(spark, samples, tmp_path, argv, said):
    with pytest.raises(UsageError, match=said):
        shard(spark, samples, tmp_path, *argv)


@pytest.mark.parametrize(
    ("given", "said"), [("A,B,A", "'A' is named twice"), ("[]", "should have at least 1 item")]
)
def test_classes_that_cannot_be_numbered_are_refused_before_spark_starts(tmp_path, given, said):
    argv = ["--samples", str(tmp_path), "--shards", str(tmp_path / "out"), "--classes", given]

    with pytest.raises(UsageError, match=said):
        load_config(ShardConfig, argv)


def test_a_folder_without_samples_is_refused(tmp_path):
    config = ShardConfig(samples=str(tmp_path), shards=tmp_path / "out")
    with pytest.raises(UsageError, match="has not finished"):
        open_samples(config)


PIXELS = next(name for name in ledger.SCHEMA.names if name.startswith("pixel_"))
DEALT = ("patient_key", PIXELS, "split", "target")
APART = [
    ("a", "1", None, "train"), ("a", "2", "train", "train"), ("b", "3", "val", "val"),
    ("c", "4", "train", "test"), ("c", "5", "test", "test"), ("d", "6", "val", "train"),
    ("e", "7", "test", "val"), ("e", "8", None, "val"),
]  # fmt: skip


def leak_check(spark: SparkSession, rows: list[tuple[str | None, ...]]) -> dict[str, int]:
    dealt = spark.createDataFrame(rows, ", ".join(f"{name} string" for name in DEALT))
    return assignment.leak_check(dealt)


@pytest.mark.spark
def test_splits_that_are_apart_are_told_from_their_hints(spark):
    assert leak_check(spark, APART) == {
        "patients_in_two_splits": 0,
        "images_in_two_splits": 0,
        "hints_overruled": 2,  # d and e; c is in the most held-out of the splits it came with
        "patients_with_several_hints": 1,
    }


@pytest.mark.spark
@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (("a", "9", None, "val"), "'patients_in_two_splits': 1, 'images_in_two_splits': 0"),
        (("b", "9", None, "test"), "'patients_in_two_splits': 1, 'images_in_two_splits': 0"),
        (("z", "1", None, "test"), "'patients_in_two_splits': 0, 'images_in_two_splits': 1"),
        (("a", "2", None, "test"), "'patients_in_two_splits': 1, 'images_in_two_splits': 1"),
    ],
)
def test_a_patient_or_an_image_in_two_splits_ends_the_job(spark, leak, said):
    with pytest.raises(RunError, match=f"The splits are not disjoint: {{{said}}}"):
        leak_check(spark, [*APART, leak])


@pytest.mark.spark
def test_a_flipped_bit_in_the_samples_is_noticed_and_named(spark, samples, tmp_path):
    copy = tmp_path / "samples"
    shutil.copytree(samples, copy)
    part = next((copy / "data").rglob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)

    with pytest.raises(RunError, match=f"{part.name} .* has been damaged"):
        shard(spark, copy, tmp_path / "shards")
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.spark
def test_a_full_disk_is_one_sentence_and_leaves_the_shards_that_were_there(
    spark, samples, tmp_path
):
    with small_disk(tmp_path / "disk", 64 << 10) as mounted:
        if not mounted:
            pytest.skip("this machine does not let us mount a small disk")
        shards = tmp_path / "disk" / "shards"
        before = shard(spark, samples, shards)
        files = sorted(shards.rglob("*"))

        (tmp_path / "disk" / "ballast").write_bytes(bytes(_free(tmp_path / "disk") - 8192))
        with pytest.raises(RunError, match="No space left on device") as raised:
            shard(spark, samples, shards, "--seed", "1")

        assert "\n" not in str(raised.value)
        assert read_manifest(shards) == before
        verify(shards, before)
        # No hidden files either: each retry would use as much disk again.
        assert sorted(shards.rglob("*")) == files


MADE = ("train-00000.parquet", ".val-00001.parquet.0123abcd", ".test-00000.parquet.ffffffff")
THEIRS = ("notes.txt", "train-00000.parquet.bak", ".test-0.parquet.ffffffff", "train.parquet")


@given(
    planted=st.sets(st.tuples(st.sampled_from(["", "old", "20260101T000000-00000a"]),
                              st.sampled_from(THEIRS))),
    left=st.sets(st.sampled_from(MADE)),
)  # fmt: skip
def test_what_failed_jobs_left_goes_and_files_of_others_stay(tmp_path_factory, planted, left):
    folder = tmp_path_factory.mktemp("shards")
    arrays = np.zeros((3, 4, 4, 1), np.uint8), np.arange(3) % 2
    write_arrays(folder, dict.fromkeys(("train", "val", "test"), arrays))
    theirs = {folder / "data" / place / name for place, name in planted}
    made = {folder / "data" / "20260101T000000-00000a" / name for name in left}
    for path in theirs | made:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    clean_shards(folder)

    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in made)
    assert (folder / "data" / "train-00000.parquet").exists()


def test_where_the_manifest_is_damaged_no_shard_is_removed(tmp_path):
    shard = tmp_path / "data" / "20260101T000000-00000a" / "train-00000.parquet"
    shard.parent.mkdir(parents=True)
    shard.touch()
    (tmp_path / "manifest.json").write_text("{")

    clean_shards(tmp_path)

    assert shard.exists()


def _free(disk: Path) -> int:
    return shutil.disk_usage(disk).free
