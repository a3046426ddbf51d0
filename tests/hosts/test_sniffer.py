"""The sniffer finds a key wherever the network cuts it, and nothing where there is none."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sniffer import said_aloud, streams

KEY = bytes.fromhex("8f3a61d07be24c95a1f60d2e93b84c7715f9e02d6ba8c433907e51dd26fc18ab")
SPOKEN: list[Callable[[bytes], bytes]] = [
    bytes,
    lambda key: key[5:13],
    lambda key: key.hex().encode(),
    lambda key: key.hex().upper().encode(),
    base64.b64encode,
    lambda key: base64.urlsafe_b64encode(b"k" + key),
    lambda key: base64.b64encode(b"??" + key + b"more"),
]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sniffed") / "frames"


def _frame(sequence: int, payload: bytes) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", 7077, 4242, sequence % 2**32, 0, 5 << 4, 0, 0, 0, 0)
    hosts = (b"\x0a\x4d\0\1", b"\x0a\x4d\0\2")
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 0, 0, 64, 6, 0, *hosts)
    frame = bytes(12) + b"\x08\x00" + ip + tcp + payload
    return struct.pack("!I", max(60, len(frame))) + frame.ljust(60, b"\0")


@given(
    st.binary(max_size=200),
    st.sampled_from(SPOKEN),
    st.lists(st.integers(1, 300), max_size=9),
    st.integers(0, 2**32 - 1),
    st.randoms(use_true_random=False),
)
def test_a_stream_is_put_together_however_it_was_cut_and_sent(
    capture: Path,
    before: bytes,
    spoken: Callable[[bytes], bytes],
    cuts: list[int],
    start: int,
    order: random.Random,
) -> None:
    said = before + spoken(KEY) + b"after"
    edges = sorted({0, len(said), *(cut for cut in cuts if cut < len(said))})
    parts = [(a, said[a:b]) for a, b in pairwise(edges)]
    again = parts + parts[:1]  # sent twice
    order.shuffle(again)
    capture.write_bytes(b"".join(_frame(start + at, part) for at, part in again))

    assert [what for _, what in streams(capture)] == [said]
    assert said_aloud(capture, KEY) == [("10.77.0.1:7077", "10.77.0.2:4242")]


def test_nothing_is_found_where_nothing_was_said(capture: Path) -> None:
    other = random.Random(0).randbytes(1 << 16)
    whole = b"".join(_frame(at, other[at : at + 1400]) for at in range(0, len(other), 1400))
    capture.write_bytes(whole + struct.pack("!I", 60) + bytes(59))  # and one cut off at the end

    assert said_aloud(capture, KEY) == []
