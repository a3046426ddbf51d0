"""Small files and folders, local or remote: writes are atomic."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from medspark import storage
from medspark.errors import UsageError

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty folder."""
    if request.param == "local":
        return str(tmp_path)
    memory = fsspec.filesystem("memory")
    if memory.exists("/storage"):
        memory.rm("/storage", recursive=True)
    memory.makedirs("/storage")
    return "memory://storage"


def names(url: str) -> set[str]:
    return {entry.path.rpartition("/")[2] for entry in storage.children(url)}


def test_a_text_comes_back_and_replaces_the_one_before(place: str):
    file = storage.join(place, "file")
    assert storage.read_text(file) is None

    for text in ("one", "zwölf\n"):
        storage.write_text(file, text)
        assert storage.read_text(file) == text

    assert names(place) == {"file"}


def test_folders_and_files_are_told_apart(place: str):
    folder, file = storage.join(place, "folder"), storage.join(place, "folder/file")
    storage.make_folder(folder)
    storage.make_folder(folder)
    storage.write_text(file, "x")

    assert storage.is_folder(folder)
    assert not storage.is_file(folder)
    assert storage.is_file(file)
    assert not storage.is_folder(file)
    (entry,) = storage.children(place)
    assert (entry.path, entry.is_folder) == (folder, True)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"Cannot create the folder .*file/below: \w"):
        storage.make_folder(str(tmp_path / "file" / "below"))


def test_a_file_system_without_a_driver_is_a_sentence():
    with pytest.raises(UsageError, match="nowhere://x cannot be reached: "):
        storage.is_file("nowhere://x")


def test_an_unfinished_text_leaves_the_one_that_was_there(tmp_path: Path, monkeypatch):
    storage.write_text(str(tmp_path / "file"), "old")
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("killed"))

    with pytest.raises(pytest.fail.Exception):
        storage.write_text(str(tmp_path / "file"), "new")

    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"mtime": 1.5}, 1_500_000_000),
        ({"LastModified": AT}, int(AT.timestamp()) * 10**9),
        ({"last_modified": AT, "created": 3}, int(AT.timestamp()) * 10**9),
        ({"updated": "text", "created": 3}, 3 * 10**9),
        ({}, 0),
    ],
)
def test_every_file_system_says_the_last_change_in_its_own_way(info, expected):
    assert storage._modified(info) == expected


@pytest.mark.parametrize(("url", "local"), [("/x", True), ("memory://x", False)])
def test_what_is_local_has_no_scheme(url, local):
    assert storage.is_local(url) == local
