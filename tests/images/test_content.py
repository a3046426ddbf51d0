"""The kind of a file: one answer for guarding and decoding."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medspark.images.content import Content, content_of
from medspark.images.decode import decode
from medspark.images.dicom import NotPlain, looks_plain
from medspark.images.guard import GuardedDecoder
from medspark.images.rendering import Rendering

SMALL = Rendering(size=16)
# The transfer syntax element of an uncompressed DICOM file.
LURE = b"\x02\0\x10\0UI\x12\x001.2.840.10008.1.2\0"
KINDS = ("PNG", "JPEG", "TIFF", "BMP")


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(file, kind)
    return file.getvalue()


def _with_lure(kind: str) -> bytes:
    """Return a valid picture that carries the lure at a place where its format allows any bytes."""
    image, file = Image.fromarray(np.zeros((16, 16), np.uint8)), io.BytesIO()
    text = LURE.decode("latin-1")
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Comment", text)
        image.save(file, kind, pnginfo=info)
    else:
        image.save(file, kind, comment=LURE)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_that_carries_a_dicom_header_is_guarded(kind: str) -> None:
    data = _with_lure(kind)
    assert looks_plain(data[:1024])

    with GuardedDecoder(rendering=SMALL) as guard:
        (frame,) = guard.decode(data)
        assert guard._child is not None

    assert frame.attributes.file_format == kind.lower()


@given(kind=st.sampled_from(KINDS), at=st.integers(132, 800))
def test_no_place_of_the_lure_makes_a_picture_plain(kind: str, at: int) -> None:
    data = picture(kind).ljust(at, b"\0")
    data = data[:at] + LURE + data[at:]

    with pytest.raises(NotPlain):
        list(decode(data, rendering=SMALL, plain_only=True))


@given(head=st.sampled_from([picture(kind) for kind in KINDS]), rest=st.binary(max_size=40))
def test_the_mark_of_dicom_comes_before_whatever_its_preamble_is(head: bytes, rest: bytes) -> None:
    marked = head[:128].ljust(128, b"\0") + b"DICM" + rest

    assert content_of(marked) is Content.DICOM
    assert content_of(head) is Content.RASTER


@pytest.mark.parametrize("first", [b"\x02\0", b"\x08\0", b"\0\x08", b"\0\x02"])
def test_a_data_set_without_preamble_is_dicom_and_a_cut_one_nothing(first: bytes) -> None:
    assert content_of(first + bytes(6)) is Content.DICOM
    assert content_of(first + bytes(5)) is None


@given(head=st.binary(max_size=200))
def test_anything_else_is_no_image_and_needs_no_process(head: bytes) -> None:
    if content_of(head) is None and head:
        with GuardedDecoder(rendering=SMALL) as guard:
            with pytest.raises(Exception, match="not_an_image"):
                list(guard.decode(head))
            assert guard._child is None
