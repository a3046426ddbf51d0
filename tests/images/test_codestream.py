"""Codestream headers, read without decoding."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medspark.images import phantom
from medspark.images.codestream import Codestream, read_codestream


def _saved(kind: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize("shape", [(70, 33), (40, 60, 3)])
def test_dimensions_are_read_from_the_header(kind: str, shape: tuple[int, ...]) -> None:
    components = shape[2] if len(shape) == 3 else 1

    assert read_codestream(_saved(kind, shape)) == Codestream(shape[0], shape[1], components, 8)


def test_jpeg_ls_is_read_too() -> None:
    config = phantom.PhantomConfig(count=1, size=40, syntaxes=("jpeg_ls",), bits=(12,))
    data = phantom.encode(next(iter(phantom.plan(config))), config)

    found = read_codestream(data[data.index(b"\xff\xd8\xff") :])

    assert found is not None
    assert (found.rows, found.columns, found.precision) == (40, 40, 12)


def test_a_scan_of_another_process_is_noticed() -> None:
    data = bytearray(_saved("JPEG", (16, 16)))
    scan = data.index(b"\xff\xda")
    data[scan + 8] = 0  # Se, the last coefficient of the scan

    found = read_codestream(bytes(data))

    assert found is not None
    assert not found.conformant


@given(data=st.binary(max_size=200), head=st.sampled_from([b"\xff\xd8", b"\xff\x4f\xff\x51", b""]))
def test_rubbish_has_a_header_or_none_and_never_raises(data: bytes, head: bytes) -> None:
    read_codestream(head + data)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@given(cut=st.integers(0, 700))
def test_a_cut_header_never_raises(kind: str, cut: int) -> None:
    read_codestream(_saved(kind, (20, 20))[:cut])
