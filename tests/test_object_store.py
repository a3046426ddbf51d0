"""S3 as a file system: whole and conditional writes, and errors of one sentence."""

from __future__ import annotations

import builtins
import threading
import urllib.request
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import serving

from medspark import object_store, storage
from medspark.errors import RunError, UsageError
from medspark.object_store import AccessDeniedError, ObjectStore

NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)


@pytest.fixture
def place(bucket: str) -> str:
    return bucket.removeprefix("s3://")


@pytest.fixture(scope="session")
def named(s3_server: str) -> str:
    """A bucket for objects of any name."""
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/named", method="PUT")).close()
    return "named"


def test_any_name_of_a_file_comes_back(named: str, s3_environment: object) -> None:
    system = ObjectStore()

    @given(folder=NAMES, name=NAMES)
    def law(folder: str, name: str) -> None:
        path = f"{named}/{folder}/{name}"
        system.pipe_file(path, name.encode())

        assert system.cat_file(path) == name.encode()
        assert path in system.find(f"{named}/{folder}")
        assert path in system.ls(f"{named}/{folder}", detail=False)

    law()


def test_folders_are_there_with_their_first_object(place: str) -> None:
    system = ObjectStore()
    system.pipe_file(f"{place}/a/b/c", b"1")

    assert system.isdir(place)
    assert system.isdir(f"{place}/a/b")
    assert system.isfile(f"{place}/a/b/c")
    assert not system.exists(f"{place}/a/b/c/d")
    assert not system.exists(f"{place}/a/b2")
    assert [entry["type"] for entry in system.ls(f"{place}/a")] == ["directory"]
    system.rm(f"{place}/a", recursive=True)
    assert not system.exists(f"{place}/a")


def test_of_many_writers_at_once_one_creates_and_one_replaces(bucket: str) -> None:
    url = f"{bucket}/one"

    for version in (None, "now"):
        if version:
            _, version = storage.read_version(url)
        written: list[bool] = []

        def write(number: int, version: str | None = version, to: list[bool] = written) -> None:
            to.append(storage.write_if(url, f"{version} {number}".encode(), version)[0])

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert sorted(written) == [False] * 7 + [True]


def test_a_document_that_another_changed_is_not_replaced(bucket: str) -> None:
    first = storage.commit(f"{bucket}/x", "1", None)
    storage.commit(f"{bucket}/x", "2", first)

    with pytest.raises(RunError, match="Another job changed"):
        storage.commit(f"{bucket}/x", "3", first)

    assert storage.read_text(f"{bucket}/x") == "2"


def test_a_repeated_request_that_had_been_done_is_no_loss(bucket: str) -> None:
    _, first = storage.write_if(f"{bucket}/x", b"mine", None)

    assert storage.write_if(f"{bucket}/x", b"mine", None) == (True, first)


def test_a_document_that_is_gone_is_not_written_again(bucket: str) -> None:
    _, version = storage.write_if(f"{bucket}/x", b"1", None)
    storage.remove_file(f"{bucket}/x")

    assert storage.write_if(f"{bucket}/x", b"2", version) == (False, None)


def test_a_file_is_there_when_it_is_closed_and_not_after_an_error(place: str) -> None:
    system, table = ObjectStore(), pa.table({"a": list(range(5000))})

    with system.open(f"{place}/x", "wb") as file, pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        assert not system.exists(f"{place}/x")
    with pytest.raises(ZeroDivisionError), system.open(f"{place}/y", "wb") as file:
        file.write(bytes(20 << 20))
        raise ZeroDivisionError

    assert pq.read_table(f"{place}/x", filesystem=system) == table
    assert not system.exists(f"{place}/y")


def test_a_large_file_is_copied_in_pieces_both_ways(place: str, tmp_path: Any) -> None:
    system, content = ObjectStore(), bytes(range(256)) * 100_000
    (tmp_path / "in").write_bytes(content)

    system.put_file(str(tmp_path / "in"), f"{place}/x")
    system.get_file(f"{place}/x", str(tmp_path / "out"))

    assert (tmp_path / "out").read_bytes() == content
    with system.open(f"{place}/x", "rb") as file:
        file.seek(1000)
        assert file.read(7) == content[1000:1007]


CALLS = {
    "read": lambda url: storage.read_version(url),
    "list": lambda url: list(storage.children(url)),
    "look": storage.is_folder,
    "write": lambda url: storage.write_text(url, "x"),
    "replace": lambda url: storage.write_if(url, b"x", '"0"'),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_one_sentence(s3_environment: object, call: str) -> None:
    with pytest.raises(UsageError, match=r"^There is no bucket nowhere at http://[\d.:]+\.$"):
        CALLS[call]("s3://nowhere/x")


@pytest.mark.parametrize("call", CALLS)
def test_refused_credentials_are_one_sentence_without_them(
    s3_environment: object, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(INITIAL_NO_AUTH_ACTION_COUNT="0") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(UsageError, match="credentials") as raised:
            CALLS[call]("s3://bucket/x")

    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value).lower().replace("aws_secret_access_key", "")


def test_a_store_that_does_not_answer_is_one_sentence(
    s3_environment: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(RunError, match=r"^http://127.0.0.1:9 does not answer \(s3://b/x\)\.$"):
        storage.read_version("s3://b/x")


def test_a_bucket_has_a_name() -> None:
    with pytest.raises(UsageError, match="names a bucket: s3://BUCKET/FOLDER"):
        storage.is_folder("s3:///x")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="has no credentials in it") as raised:
        storage.is_folder("s3://key:hidden@bucket/x")
    assert "hidden" not in str(raised.value)


def test_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("obstore"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(UsageError, match=r"pip install 'medspark\[s3\]'"):
        storage.is_folder("s3://bucket/x")


def test_denied_access_is_both_a_sentence_and_an_error_of_one_file() -> None:
    assert issubclass(AccessDeniedError, UsageError)
    assert issubclass(AccessDeniedError, OSError)


def test_a_name_that_no_path_can_have_is_one_sentence(place: str, s3_server: str) -> None:
    put = urllib.request.Request(f"{s3_server}/{place}/odd//x", data=b"x", method="PUT")
    urllib.request.urlopen(put).close()

    with pytest.raises(UsageError, match="has a part that is empty"):
        list(storage.children(f"s3://{place}/odd"))
