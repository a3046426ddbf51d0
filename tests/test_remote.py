"""Addresses as paths, and copies that the processes of one machine share."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medspark import remote, storage
from medspark.config import Config
from medspark.errors import RunError, UsageError
from medspark.remote import AnyPath, RemoteFile, RemotePath, any_path, copied

PARTS = st.lists(st.text("abc-. é", min_size=1).filter(lambda s: s.strip(".")), max_size=4)


class Asked(Config):
    place: AnyPath
    folder: Path = Path("x")


@given(parts=PARTS)
def test_an_address_stays_one_however_it_is_handed_on(parts: list[str]) -> None:
    url = "/".join(["s3://bucket", *parts])
    path = any_path(url)

    assert isinstance(path, RemotePath)
    assert str(path) == os.fspath(path) == str(path.resolve()) == url
    assert any_path(path) == path == any_path(Path(url)) == pickle.loads(pickle.dumps(path))
    assert str(path / "x") == f"{url}/x"
    assert (path / "x").parent == path
    asked = Asked(place=url)
    assert asked.place == path == Asked.model_validate(asked.model_dump(mode="json")).place
    assert Asked.model_validate_json(asked.model_dump_json()) == asked


@pytest.mark.parametrize(
    ("text", "path"),
    [("file:///a/b", "/a/b"), ("file:/a/b", "/a/b"), ("dbfs:/mnt/x", "/dbfs/mnt/x")],
)
def test_an_address_of_this_machine_is_a_path(text: str, path: str) -> None:
    assert any_path(text) == Path(path)


@pytest.mark.parametrize("text", ["/a/b", "a/s3:/b", "s3", "C:/x", "~/x", "a::b"])
def test_a_path_is_no_address(text: str) -> None:
    assert any_path(text) == Path(text)
    assert type(any_path(text)) is type(Path())


def test_a_setting_of_the_file_system_refuses_addresses() -> None:
    with pytest.raises(ValidationError, match="s3://b/x is an address: this has to be a path"):
        Asked(place="x", folder="s3://b/x")
    with pytest.raises(ValidationError, match="this is no path"):
        Asked(place=5)


def put(url: str, **files: bytes) -> list[RemoteFile]:
    for name, content in files.items():
        storage.write_bytes(f"{url}/{name}", content)
    return [
        RemoteFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]


def test_a_damaged_file_leaves_no_copy(bucket: str, tmp_path: Path) -> None:
    (file,) = put(bucket, x=b"right")
    storage.write_bytes(f"{bucket}/x", b"wrong")

    with pytest.raises(RunError, match="x has been damaged"):
        copied(bucket, [file], tmp_path, name="n")

    assert not (tmp_path / "n" / "x").exists()


def test_a_missing_file_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{bucket}/gone is missing.$"):
        copied(bucket, [RemoteFile("gone", 3)], tmp_path, name="n")


def test_the_size_is_said_first_and_too_little_room_is_one_sentence(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    files = put(bucket, x=bytes(2_000_000))
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: full)
    caplog.set_level("INFO")

    with pytest.raises(UsageError, match=r"2 MB to copy, and .* has no room for them"):
        copied(bucket, files, tmp_path, name="n")

    assert f"copying 1 files of {bucket} (2.0 MB) to {tmp_path}" in caplog.text


def _copy(environment: dict[str, str], url: str, files: list[RemoteFile], cache: Path) -> None:
    os.environ.update(environment)
    real = remote._copy

    def counted(*args: Any) -> None:
        (cache / f"copied-{os.getpid()}").touch()
        real(*args)

    remote._copy = counted
    copied(url, files, cache, name="n")


@pytest.mark.slow
def test_processes_of_one_machine_share_one_download(
    bucket: str, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    files = put(bucket, x=os.urandom(5_000_000), y=b"y")
    (tmp_path / ".medspark.json").write_text('{"kind": "shard cache"}')
    context = multiprocessing.get_context("spawn")
    args = (s3_environment, bucket, files, tmp_path)
    processes = [context.Process(target=_copy, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("copied-*"))) == 1
    assert {path.name for path in (tmp_path / "n").iterdir()} == {"x", "y"}
