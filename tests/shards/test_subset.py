"""Fewer training images, drawn from the same ones, and everything else as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medspark.data.native import MappedSplit
from medspark.shards.manifest import read_manifest, verify
from medspark.shards.subset import training_share


@pytest.fixture
def shards(write_shards) -> Path:
    return write_shards(rows=50, shards=3)


def training_images(folder: Path) -> np.ndarray:
    split = MappedSplit(folder, read_manifest(folder), "train")
    images, labels = split.gather(np.arange(len(split)))
    return np.concatenate([images.reshape(len(split), -1), labels[:, None]], axis=1)


def test_a_share_is_the_first_rows_so_that_shares_are_nested(shards: Path, tmp_path: Path):
    whole = training_images(shards)

    for share, rows in ((0.1, 5), (0.5, 25), (0.99, 50)):
        part = training_share(shards, tmp_path / "parts", share=share)
        np.testing.assert_array_equal(training_images(part), whole[:rows])


def test_a_share_is_a_dataset_of_its_own_with_the_same_other_splits(shards: Path, tmp_path: Path):
    part = training_share(shards, tmp_path / "parts", share=0.2)

    before, after = read_manifest(shards), read_manifest(part)
    verify(part, after)
    assert after.digest != before.digest
    assert (after.splits["val"], after.splits["test"]) == (
        before.splits["val"],
        before.splits["test"],
    )
    assert after.splits["train"].class_counts == (5, 5)
    assert after.splits["train"].patients == 10


def test_a_share_is_written_once_and_all_of_it_is_the_dataset_itself(shards: Path, tmp_path: Path):
    first = training_share(shards, tmp_path / "parts", share=0.2)
    written = (first / "manifest.json").stat().st_mtime_ns

    again = training_share(shards, tmp_path / "parts", share=0.2)

    assert again == first
    assert (again / "manifest.json").stat().st_mtime_ns == written
    assert training_share(shards, tmp_path / "parts", share=1.0) == shards
