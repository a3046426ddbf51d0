"""Images that look alike go to one split, even under different patient ids."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medspark.config import load_config
from medspark.errors import UsageError
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.sharding import near
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.sharding.near import NEAR_DUPLICATES, SIDE, Lookalike, perceptual_hash, tied_patients
from medspark.shards.manifest import read_manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MOTIFS = 12


def motif(seed: int) -> np.ndarray:
    """Return a smooth image of 64 x 64 pixels, as radiographs are."""
    coarse = np.random.default_rng(seed).integers(30, 220, (6, 6)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


def copy_of(image: np.ndarray) -> np.ndarray:
    """Return ``image`` as another export of it: brighter, and with a little noise."""
    noise = np.random.default_rng(0).integers(-2, 3, image.shape)
    return np.clip(image.astype(int) + 5 + noise, 0, 255).astype(np.uint8)


def bits_apart(one: np.ndarray, other: np.ndarray) -> int:
    small = (np.asarray(Image.fromarray(i).resize((SIDE, SIDE))) for i in (one, other))
    first, second = (perceptual_hash(image.tobytes()) for image in small)
    return ((first ^ second) & (2**64 - 1)).bit_count()


def test_a_copy_is_a_few_bits_away_and_another_image_many():
    motifs = [motif(seed) for seed in range(MOTIFS)]

    assert max(bits_apart(image, copy_of(image)) for image in motifs) <= 4
    others = [bits_apart(a, b) for i, a in enumerate(motifs) for b in motifs[:i]]
    assert min(others) > 8


def test_the_hash_of_no_image_is_told():
    found = [Lookalike(f"s{n}", f"p{n}", hashed) for n, hashed in enumerate([77, -5, 77, -5, 9, 9])]

    told = near._numbered(found[::-1])

    assert [(one.sample_key, one.lookalike) for one in told] == [
        *[("s0", 1), ("s2", 1), ("s1", 2), ("s3", 2), ("s4", 3), ("s5", 3)]
    ]
    assert tied_patients(told) == tied_patients(found)


def test_patients_are_tied_through_images_that_they_share_with_others():
    found = [
        *[Lookalike("1", "b", 7), Lookalike("2", "c", 7)],
        *[Lookalike("3", "c", 9), Lookalike("4", "a", 9)],
        *[Lookalike("5", "y", 1), Lookalike("6", "x", 1)],
    ]

    assert tied_patients(found) == {"a": "a", "b": "a", "c": "a", "x": "x", "y": "x"}


@pytest.mark.spark
@pytest.mark.parametrize("bits", [0, 1, 2, 6, 15])
def test_all_pairs_of_hashes_within_the_bits_are_found_and_no_others(spark, bits):
    """Compare with brute force; two hashes may agree in any single band only."""
    random, edges = np.random.default_rng(bits), [64 * k // (bits + 1) for k in range(bits + 2)]
    first = [int(n) for n in random.integers(-(2**63), 2**63, 3)]
    apart = [
        _flipped(hashed, {int(random.integers(low, high)) for low, high in pairwise(edges)} - kept)
        for hashed in first
        for kept in ({bit} for bit in range(64))
    ]
    spread = [
        _flipped(first[0], {int(random.integers(low, high)) for k, (low, high)
                            in enumerate(pairwise(edges)) if k != band})
        for band in range(bits + 1)
    ]  # fmt: skip
    hashes = sorted({*first, *apart, *spread, _flipped(first[1], {63}), _flipped(first[1], {0})})
    table = spark.createDataFrame([(each,) for each in [*hashes, *hashes]], "hash bigint")

    found = near._near_hashes(table, bits)

    near_ones = {
        (one, other)
        for one, other in combinations(hashes, 2)
        if 1 <= ((one ^ other) & (2**64 - 1)).bit_count() <= bits
    }
    assert bits == 0 or len(near_ones) > bits
    assert sorted(found) == sorted(near_ones)


def _flipped(hashed: int, bits: set[int]) -> int:
    pattern = (hashed & (2**64 - 1)) ^ sum(1 << bit for bit in bits)
    return pattern - 2**64 if pattern >> 63 else pattern


@pytest.fixture(scope="module")
def samples(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 24 patients: every motif belongs to one patient, and its copy to another."""
    folder = tmp_path_factory.mktemp("near")
    lines = ["path,label,patient_id"]
    (folder / "in").mkdir()
    for seed in range(MOTIFS):
        for who, image in (("one", motif(seed)), ("other", copy_of(motif(seed)))):
            Image.fromarray(image).save(folder / "in" / f"{who}-{seed}.png")
            lines.append(f"{who}-{seed}.png,{'ab'[seed % 2]},{who}-{seed}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    config = IngestConfig(
        source=str(folder / "in"),
        labels=str(folder / "labels.csv"),
        samples=str(folder / "out"),
        image_size=32,
        guarded=False,
    )
    ingest(spark, open_archive(config, key=b"\x22" * 32))
    return folder / "out"


def shard(spark: SparkSession, samples: Path, shards: Path, *argv: str) -> dict[str, str]:
    """Make shards; return the split of every patient."""
    config = load_config(ShardConfig, ["--samples", str(samples), "--shards", str(shards), *argv])
    make_shards(spark, config, open_samples(config))
    return {
        patient: name
        for name, split in read_manifest(shards).splits.items()
        for file in split.shards
        for patient in pq.read_table(shards / file.path)["patient_key"].to_pylist()
    }


@pytest.mark.spark
def test_patients_whose_images_look_alike_are_in_one_split(spark, samples, tmp_path):
    shares = ("--split.val", "0.3", "--split.test", "0.3")

    apart = shard(spark, samples, tmp_path / "apart", *shares)
    kept = shard(spark, samples, tmp_path / "kept", *shares, "--near_duplicates", "6")

    table = pq.read_table(tmp_path / "kept" / NEAR_DUPLICATES).to_pylist()
    alike: dict[int, set[str]] = {}
    for row in table:
        alike.setdefault(row["lookalike"], set()).add(row["patient_key"])
    assert len(table) == 2 * MOTIFS
    assert sorted(alike) == list(range(1, MOTIFS + 1))  # numbers, and not hashes
    assert [len(patients) for patients in alike.values()] == [2] * MOTIFS
    assert all(len({kept[patient] for patient in patients}) == 1 for patients in alike.values())
    assert any(len({apart[patient] for patient in patients}) == 2 for patients in alike.values())
    leak_check = read_manifest(tmp_path / "kept").leak_check
    assert leak_check["near_duplicates"] == leak_check["patients_kept_together"] == 2 * MOTIFS
    assert not (tmp_path / "apart" / NEAR_DUPLICATES).exists()


@pytest.mark.spark
def test_equal_hashes_alone_count_where_no_bit_may_differ(spark, samples, tmp_path):
    shard(spark, samples, tmp_path, "--near_duplicates", "0")

    assert read_manifest(tmp_path).leak_check["near_duplicates"] < 2 * MOTIFS


def test_the_library_that_is_missing_is_named_before_spark_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(near, "find_spec", lambda name: None)
    config = ShardConfig.model_validate(
        {"samples": str(tmp_path), "shards": tmp_path / "shards", "near_duplicates": 4}
    )

    with pytest.raises(UsageError, match=r"pip install 'medspark\[near\]'"):
        open_samples(config)
