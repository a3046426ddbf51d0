"""Shards in an object store: copied whole, checked, and committed by one writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medspark import storage
from medspark.data.config import DataConfig
from medspark.data.source import open_source
from medspark.errors import RunError, UsageError
from medspark.remote import any_path
from medspark.shards.local import local_shards, patients_of
from medspark.shards.manifest import manifest_version, read_manifest, verify, write_manifest


@pytest.fixture
def stored(write_shards, bucket: str) -> tuple[Path, str]:
    """A folder of shards, and the same shards in a store."""
    folder, url = write_shards(), f"{bucket}/shards"
    for path in folder.rglob("*"):
        if path.is_file():
            system, place = storage.filesystem(f"{url}/{path.relative_to(folder)}")
            system.put_file(str(path), place)
    return folder, url


def test_shards_of_a_store_are_read_as_if_they_lay_here(stored: tuple[Path, str]) -> None:
    folder, url = stored

    here, there = (open_source(place, DataConfig()) for place in (folder, any_path(url)))

    assert there.manifest == here.manifest
    rows = np.arange(50)
    for mine, theirs in zip(*(s.split("train").gather(rows) for s in (here, there)), strict=True):
        assert np.array_equal(mine, theirs)
    keys = [patients_of(place, here.manifest, "val").tolist() for place in (folder, any_path(url))]
    assert keys[0] == keys[1]


def test_a_missing_or_cut_shard_of_a_store_is_named_before_anything_is_copied(
    stored: tuple[Path, str],
) -> None:
    _, url = stored
    manifest = read_manifest(url)
    verify(url, manifest)
    shard = f"{url}/{manifest.splits['val'].shards[0].path}"

    storage.write_bytes(shard, b"cut")
    with pytest.raises(UsageError, match=f"{shard} has 3 bytes instead of"):
        verify(url, manifest)
    storage.remove_file(shard)
    with pytest.raises(UsageError, match=f"{shard} is missing"):
        verify(url, manifest)


def test_a_manifest_copies_no_file_to_elsewhere(stored: tuple[Path, str]) -> None:
    _, url = stored
    manifest = read_manifest(url)
    text = manifest.model_dump_json().replace(manifest.splits["val"].shards[0].path, "../../x")
    storage.write_text(f"{url}/manifest.json", text)

    with pytest.raises(UsageError, match=r"names a file outside of it: \.\./\.\./x"):
        local_shards(url)


def test_of_two_writers_of_shards_the_second_is_told(stored: tuple[Path, str]) -> None:
    _, url = stored
    manifest, seen = read_manifest(url), manifest_version(url)
    write_manifest(url, manifest.model_copy(update={"generation": "theirs"}), seen)

    with pytest.raises(RunError, match="Another job changed"):
        write_manifest(url, manifest, seen)

    assert read_manifest(url).generation == "theirs"


def test_no_shards_at_an_address_are_one_sentence(bucket: str) -> None:
    with pytest.raises(UsageError, match=f"^{bucket}/none holds no manifest.json: jobs/shard.py"):
        read_manifest(f"{bucket}/none")
