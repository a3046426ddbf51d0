"""A key that can be guessed, or that others can read, is refused."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, load_key
from medspark.images.secret import check_readers, check_strength

STRONG = hashlib.sha256(b"as good as random").digest()


@given(value=st.integers(0, 255), step=st.integers(0, 255), length=st.integers(16, 64))
def test_bytes_in_steps_of_one_size_are_no_key(value: int, step: int, length: int) -> None:
    with pytest.raises(UsageError, match="can be guessed"):
        check_strength(bytes((value + step * n) % 256 for n in range(length)), "K")


@given(block=st.binary(min_size=1, max_size=15), length=st.integers(16, 64))
def test_a_block_again_and_again_is_no_key(block: bytes, length: int) -> None:
    with pytest.raises(UsageError, match="can be guessed"):
        check_strength((block * 64)[:length], "K")


@given(seed=st.binary(), alphabet=st.binary(min_size=1, max_size=7))
def test_few_different_bytes_are_no_key(seed: bytes, alphabet: bytes) -> None:
    digest = hashlib.sha256(seed).digest()

    with pytest.raises(UsageError, match="can be guessed"):
        check_strength(bytes(alphabet[byte % len(alphabet)] for byte in digest), "K")


@given(st.binary(max_size=15))
def test_fewer_than_sixteen_bytes_are_no_key(key: bytes) -> None:
    with pytest.raises(UsageError, match="at least 16 bytes"):
        check_strength(key, "K")


@pytest.mark.parametrize(
    "text", [b"0123456789abcdef", b"correct horse battery", b"medspark-key-2026\n"]
)
def test_a_phrase_that_is_shorter_than_128_bits_is_no_key(text: bytes) -> None:
    with pytest.raises(UsageError, match="can be guessed"):
        check_strength(text, "K")


@given(seed=st.binary(), length=st.integers(16, 32))
def test_random_bytes_of_any_length_are_a_key(seed: bytes, length: int) -> None:
    check_strength(hashlib.sha256(seed).digest()[:length], "K")


def test_what_openssl_prints_in_base64_is_a_key() -> None:
    check_strength(b"q1V0bWVkc3BhcmstaXMtbm90LWEta2V5\n", "K")


def put(path: Path, mode: int, content: bytes = STRONG) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@given(mode=st.integers(0, 0o777))
def test_a_key_of_ours_is_refused_exactly_where_others_may_read_it(
    tmp_path_factory: pytest.TempPathFactory, mode: int
) -> None:
    path = put(tmp_path_factory.mktemp("key") / "key", mode)

    if mode & 0o077:
        with pytest.raises(UsageError, match=r"chmod 600 \S+/key"):
            check_readers(path)
    else:
        check_readers(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode  # it is the owner's to change


def read_only(path: Path, mode: int) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("why", ["another owner", "read-only", "no permissions"])
def test_a_key_that_is_not_ours_to_close_is_warned_about_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    path = put(tmp_path / "key", 0o644)
    if why == "another owner":
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    else:
        chmod = read_only if why == "read-only" else lambda path, mode: None
        monkeypatch.setattr(Path, "chmod", chmod)

    key = load_key(Privacy(key_file=path), dataset="s3a://bucket/samples")

    assert key == STRONG
    (message,) = caplog.messages
    assert str(path) in message


def test_a_weak_key_file_is_refused_and_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(tmp_path / "key", 0o600, b"5a" * 32)

    with caplog.at_level(logging.DEBUG), pytest.raises(UsageError, match="guessed") as caught:
        load_key(Privacy(key_file=path), dataset="/data")

    assert "openssl rand -hex 32" in str(caught.value)
    assert "5a5a" not in f"{caught.value} {caplog.text}"
