"""Files are replaced whole or not at all, and on the disk first where that is asked for."""

import os
from pathlib import Path

import pytest

from medspark.files import json_digest, replacing, sha256_of, write_whole


def test_a_block_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", "old")

    with pytest.raises(KeyError), replacing(tmp_path / "x") as draft:
        draft.write_text("new")
        raise KeyError

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "old"}


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    named: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: named.append((tmp_path / "x").exists()))

    write_whole(tmp_path / "x", "ä", durable=durable)

    assert (tmp_path / "x").read_text("utf-8") == "ä"
    assert named == ([False] if durable else [])


def test_a_hash_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'{"a": 1, "b": 2}')

    assert json_digest({"b": 2, "a": 1}) == sha256_of(tmp_path / "x")
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1}) != json_digest({"a": 1})
