"""Listing an archive: every file once, from the driver or from tasks."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from medspark import storage
from medspark.ingest import discover as discovery
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


@pytest.fixture
def outside(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the archive, with the archive's name as prefix, and links to it."""
    folder = tree.with_name(tree.name + "-outside")
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    (tree / "b" / "file").symlink_to(folder / "secret")
    (tree / "folder").symlink_to(folder)
    (tree / "a" / "above").symlink_to(Path(os.pardir, os.pardir))
    return folder


@pytest.mark.parametrize("budget", [1, 2, 1000])
def test_links_out_of_the_archive_are_listed_as_that_and_not_followed(tree, outside, budget):
    walk = Walk(str(tree))
    files, folders = walk.some(budget)
    found = [*files, *(row for folder in folders for row in walk.below(folder))]

    leading_out = {path for path, size, _ in found if size == storage.OUTSIDE}
    assert leading_out == {"b/file", "folder", "a/above"}
    assert {path for path, _, _ in found} == NAMES | leading_out


def test_what_a_link_leads_out_to_does_not_change_what_is_listed(tree, outside):
    before = sorted(Walk(str(tree)).some(1000)[0])

    (outside / "secret").write_bytes(b"another secret")
    os.utime(outside / "secret", ns=(1, 1))

    assert sorted(Walk(str(tree)).some(1000)[0]) == before


def test_links_out_of_the_archive_are_followed_where_that_is_asked_for(tree, outside):
    (tree / "a" / "above").unlink()

    files, _ = Walk(str(tree), follow_links=True).some(1000)

    sizes = {path: size for path, size, _ in files}
    assert sizes.keys() == NAMES | {"b/file", "folder/secret"}
    assert sizes["b/file"] == sizes["folder/secret"] == len("secret")


@pytest.mark.parametrize("follow", [True, False])
def test_links_that_stay_in_the_archive_are_files_and_folders_of_it(tree, follow):
    (tree / "again").symlink_to("a/1")
    (tree / "class").symlink_to(tree / "a")
    (tree / "b" / "deep").symlink_to("../class/deep")

    files, _ = Walk(str(tree), follow).some(1000)

    below_a = {f"class/{name}" for name in ("1", "2", "deep/er/3")}
    assert {path for path, _, _ in files} == NAMES | {"again", "b/deep/er/3"} | below_a
    assert {size for path, size, _ in files if path == "again"} == {3}


def test_a_source_that_is_a_link_itself_is_not_left_by_what_is_in_it(tree):
    (tree / "again").symlink_to("a/1")
    source = tree.with_name(tree.name + "-link")
    source.symlink_to(tree)

    files, _ = Walk(str(source)).some(1000)

    assert storage.OUTSIDE not in {size for _, size, _ in files}
    assert {path for path, _, _ in files} == NAMES | {"again"}
    assert storage.is_inside(str(source), "again")


@pytest.mark.parametrize("follow", [True, False])
def test_folders_that_link_to_each_other_end_somewhere(tree, follow):
    (tree / "a" / "to_b").symlink_to(tree / "b")
    (tree / "b" / "to_a").symlink_to(tree / "a")

    files, _ = Walk(str(tree), follow).some(1000)

    assert sorted(path for path, _, _ in files) == sorted(
        [*NAMES, "a/to_b/4", "a/to_b/odd name é", "b/to_a/1", "b/to_a/2", "b/to_a/deep/er/3"]
    )


def test_only_paths_that_end_in_the_source_are_inside_it(tree, outside):
    inside = {path for path in ("a/1", "b/file", "folder/secret", "../x", "a/../../x", "new")
              if storage.is_inside(str(tree), path)}  # fmt: skip

    assert inside == {"a/1", "new"}
    assert storage.is_inside("memory://bucket", "../x")  # no links there, so nothing to look at


def test_dangling_links_and_odd_files_are_listed_as_unreadable(tree):
    (tree / "gone").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe")

    (tree / "away").symlink_to("/nowhere/at/all")
    (tree / "round").symlink_to("round")

    sizes = {path: size for path, size, _ in Walk(str(tree)).some(1000)[0]}

    assert sizes["away"] == sizes["round"] == -1
    assert sizes["gone"] == sizes["pipe"] == -1


def test_a_file_is_told_by_its_size_and_the_nanosecond_of_its_last_change(tree):
    os.utime(tree / "5", ns=(7, 1_700_000_000_123_456_789))
    known = os.stat(tree / "5").st_mtime_ns  # some file systems keep fewer digits

    changed = {path: modified for path, _, modified in Walk(str(tree)).some(1000)[0]}

    assert changed["5"] == known
    assert all(changed[name] == os.stat(tree / name).st_mtime_ns for name in NAMES)


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


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_task_walks_all_its_folders_in_batches_of_a_bounded_size(tree, monkeypatch, size):
    monkeypatch.setattr(discovery, "_BATCH", size)
    folders = [pa.RecordBatch.from_pydict({"folder": [str(tree / name)]}) for name in "ab"]

    batches = list(Walk(str(tree))(folders))

    assert all(0 < batch.num_rows <= size for batch in batches)
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert {row["path"] for row in rows} == {name for name in NAMES if name[0] in "ab"}
    assert all(row["size"] == (tree / row["path"]).stat().st_size for row in rows)


@pytest.mark.spark
@pytest.mark.parametrize("budget", [2, 1000])
def test_spark_sees_what_the_driver_sees(spark, tree, budget):
    found = discover(spark, str(tree), exclude=frozenset({"5"}), budget=budget).collect()

    assert sorted(row["path"] for row in found) == sorted(NAMES - {"5"})
