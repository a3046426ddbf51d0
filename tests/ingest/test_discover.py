"""Listing an archive: every file once, whoever lists it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medspark.ingest import storage
from medspark.ingest.discover import Walk, discover


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/1", "a/2", "a/deep/er/3", "b/4", "5", ".hidden", "b/odd name é"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    return tmp_path


NAMES = {"a/1", "a/2", "a/deep/er/3", "b/4", "5", ".hidden", "b/odd name é"}


def test_the_driver_lists_a_small_archive_alone(tree):
    files, folders = Walk(str(tree)).some(100)

    assert {path for path, _, _ in files} == NAMES
    assert {size for path, size, _ in files if path == "a/1"} == {3}
    assert folders == []


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_what_the_driver_leaves_is_walked_by_tasks_and_nothing_is_seen_twice(tree, budget):
    files, folders = Walk(str(tree)).some(budget)

    walked = [row for folder in folders for row in Walk(str(tree)).below(folder)]
    assert sorted(path for path, _, _ in [*files, *walked]) == sorted(NAMES)


def test_a_link_to_a_folder_above_does_not_trap_the_walk(tree):
    (tree / "a" / "loop").symlink_to(tree)
    (tree / "a" / "self").symlink_to(tree / "a")

    files, _ = Walk(str(tree)).some(1000)

    assert {path for path, _, _ in files} == NAMES


def test_dangling_links_and_odd_files_are_listed_as_unreadable(tree):
    (tree / "gone").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe")

    sizes = {path: size for path, size, _ in Walk(str(tree)).some(1000)[0]}

    assert sizes["gone"] == sizes["pipe"] == -1


def test_a_name_that_is_not_utf8_keeps_its_row(tree):
    Path(os.fsdecode(os.fsencode(tree) + b"/caf\xe9.dcm")).write_bytes(b"")

    files, _ = Walk(str(tree)).some(1000)

    assert "caf\\xe9.dcm" in {path for path, _, _ in files}


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:/data/x/", "/data/x"),
        ("file:///data/x", "/data/x"),
        ("dbfs:/mnt/x", "/dbfs/mnt/x"),
        ("/data/./y/../x", "/data/x"),
        ("s3a://bucket/x/", "s3://bucket/x"),
        ("abfss://c@account.dfs.core.windows.net/x", "abfss://c@account.dfs.core.windows.net/x"),
    ],
)
def test_an_address_is_understood_however_it_is_spelt(url, path):
    assert storage.normalise(url) == path


def test_spark_is_told_the_scheme_in_its_own_words():
    assert storage.for_spark("s3://bucket/x") == "s3a://bucket/x"
    assert storage.for_spark("/data/x") == "file:///data/x"


def test_another_file_system_is_listed_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/archive/a/1.png": b"one", "/archive/2.png": b"two"})

    files, _ = Walk("memory://archive").some(100)

    assert {(path, size) for path, size, _ in files} == {("a/1.png", 3), ("2.png", 3)}


@pytest.mark.spark
@pytest.mark.parametrize("budget", [2, 1000])
def test_spark_sees_what_the_driver_sees(spark, tree, budget):
    found = discover(spark, str(tree), exclude=frozenset({"5"}), budget=budget).collect()

    assert sorted(row["path"] for row in found) == sorted(NAMES - {"5"})
