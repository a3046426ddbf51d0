"""DICOM files that are refused: cut, impossible, too large, or without a decoder."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from dicom_frames import PYDICOM_FILES, frames_of, refused
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames

from medspark.images import phantom
from medspark.images.limits import Limits
from medspark.images.reasons import Reason
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]
Array = npt.NDArray[Any]


def test_a_cut_file_is_truncated(dicom: MakeDicom, ramp: Array) -> None:
    assert refused(dicom(ramp)[:-100]) is Reason.TRUNCATED


def test_a_cut_compressed_file_is_truncated() -> None:
    data = (PYDICOM_FILES / "MR_small_jp2klossless.dcm").read_bytes()

    assert refused(data[:-500]) is Reason.TRUNCATED


@pytest.mark.parametrize("size", [150, 300, 420])
def test_a_file_cut_within_its_header_is_refused(dicom: MakeDicom, ramp: Array, size: int) -> None:
    assert refused(dicom(ramp)[:size]) in (
        Reason.TRUNCATED, Reason.NO_PIXEL_DATA, Reason.NO_FILE_META, Reason.INCONSISTENT_HEADER
    )  # fmt: skip


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 0}, Reason.INCONSISTENT_HEADER),
        ({"Rows": 65535, "Columns": 65535}, Reason.TOO_LARGE),
        ({"Rows": 100}, Reason.TRUNCATED),
        ({"NumberOfFrames": 70000}, Reason.TOO_LARGE),
        ({"NumberOfFrames": 70}, Reason.TRUNCATED),
        ({"BitsAllocated": 12}, Reason.INCONSISTENT_HEADER),
        ({"BitsStored": 20}, Reason.INCONSISTENT_HEADER),
        ({"SamplesPerPixel": 3}, Reason.INCONSISTENT_HEADER),
        ({"PhotometricInterpretation": "HSV"}, Reason.UNSUPPORTED_PHOTOMETRIC),
        ({"BurnedInAnnotation": "YES"}, Reason.BURNED_IN_ANNOTATION),
    ],
    ids=str,
)
def test_an_impossible_header_is_refused(
    dicom: MakeDicom, ramp: Array, elements: dict[str, Any], reason: Reason
) -> None:
    assert refused(dicom(ramp, **elements)) is reason


@pytest.mark.parametrize("nested", [False, True])
def test_an_element_that_claims_four_gigabytes_costs_nothing(
    dicom: MakeDicom, ramp: Array, tmp_path: Path, nested: bool
) -> None:
    data = dicom(ramp)
    data = data[: data.index(b"\xe0\x7f\x10\x00")]
    if nested:
        data += b"\x40\x01\x00\x10SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4
    path = tmp_path / "claim.dcm"
    with path.open("wb") as file:  # too large to be read at once, and sparse
        file.write(data + b"\x42\x01\x02\x10OB\0\0" + struct.pack("<I", 0xFFFFFFF0))
        file.truncate(40 << 20)

    tracemalloc.start()
    reason = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert reason in (Reason.TRUNCATED, Reason.NO_PIXEL_DATA, Reason.DECODE_FAILED)
    assert peak < 100 << 20


def test_a_deflated_bomb_is_not_inflated(dicom: MakeDicom, ramp: Array) -> None:
    plain = dicom(ramp)
    start = plain.index(b"\x08\x00\x16\x00UI")
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflater.compress(plain[start:] + bytes(1 << 27)) + deflater.flush()
    meta = meta.replace(b"UI\x14\x001.2.840.10008.1.2.1.99", b"UI\x16\x001.2.840.10008.1.2.1.99")

    assert refused(meta + body) is Reason.DECOMPRESSION_BOMB


def test_a_codestream_that_is_larger_than_its_header_says_is_not_decoded(dicom: MakeDicom) -> None:
    siz = struct.pack(
        ">HHHIIIIIIIIH", 0xFF51, 41, 0, 60000, 60000, 0, 0, 60000, 60000, 0, 0, 1
    ) + bytes([7, 1, 1])  # fmt: skip
    stream = b"\xff\x4f" + siz + bytes(600)

    data = dicom(np.zeros((64, 64), np.uint8), syntax=uid.JPEG2000Lossless,
                 pixel_data=encapsulate([stream]))  # fmt: skip

    assert refused(data) is Reason.INCONSISTENT_HEADER


def test_a_damaged_rle_frame_is_refused(dicom: MakeDicom) -> None:
    data = dicom(np.zeros((64, 64), np.uint8), syntax=uid.RLELossless,
                 pixel_data=encapsulate([b"\xff" * 80]))  # fmt: skip

    assert refused(data) is Reason.DECODE_FAILED


@pytest.mark.parametrize("syntax", [uid.MPEG2MPML, uid.HEVCMP51, uid.JPEG2000MC, "1.2.3.4.5"])
def test_a_syntax_without_a_decoder_is_named_as_the_reason(
    dicom: MakeDicom, ramp: Array, syntax: str
) -> None:
    plain = dicom(ramp)
    data = plain.replace(
        b"UI\x14\x001.2.840.10008.1.2.1\0",
        b"UI" + struct.pack("<H", len(syntax) + len(syntax) % 2)
        + syntax.encode() + b"\0" * (len(syntax) % 2),
    )  # fmt: skip

    assert refused(data) is Reason.UNSUPPORTED_TRANSFER_SYNTAX


@pytest.mark.parametrize(("frames", "size"), [(1 << 16, 16), (1 << 16, 224), (1 << 14, 512)])
def test_a_small_file_of_very_many_frames_is_refused_before_the_first(
    dicom: MakeDicom, frames: int, size: int
) -> None:
    data = dicom(np.zeros((1, 1), np.uint8), frames=frames, pixel_data=bytes(frames))

    assert refused(data, rendering=Rendering(size=size)) is Reason.TOO_LARGE


@pytest.mark.parametrize(("colour", "bits"), [("keep", 8), ("grey", 16), ("rgb", 8), ("rgb", 16)])
def test_what_a_file_becomes_is_bounded_to_the_byte(
    dicom: MakeDicom, colour: str, bits: int
) -> None:
    volume = np.zeros((5, 16, 16), np.uint8)
    rendering = Rendering.model_validate({"size": 8, "colour": colour, "bits": bits, "frames": 4})
    data = dicom(volume, frames=5)
    made = sum(frame.pixels.nbytes for frame in frames_of(data, rendering=rendering))

    assert refused(data, rendering=rendering, limits=Limits(output_bytes=made - 1)) is (
        Reason.TOO_LARGE
    )
    assert len(frames_of(data, rendering=rendering, limits=Limits(output_bytes=made))) == 4


def test_a_file_with_fewer_frames_than_it_claims_is_truncated_at_any_of_them(
    dicom: MakeDicom,
) -> None:
    config = phantom.PhantomConfig(count=1, size=32, syntaxes=("jpeg_ls",), bits=(8,))
    study = next(iter(phantom.plan(config)))
    one = phantom.encode(study, config)
    stream = next(generate_frames(pydicom.dcmread(io.BytesIO(one)).PixelData, number_of_frames=1))

    for found in range(1, 5):
        data = dicom(
            np.zeros((32, 32), np.uint8), syntax=uid.JPEGLSLossless, frames=5,
            pixel_data=encapsulate([stream] * found),
        )  # fmt: skip
        assert refused(data) is Reason.TRUNCATED, found


def test_limits_are_the_callers(dicom: MakeDicom, ramp: Array) -> None:
    data = dicom(ramp)

    assert refused(data, limits=Limits(frame_pixels=4095)) is Reason.TOO_LARGE
    assert refused(data, limits=Limits(file_bytes=len(data) - 1)) is Reason.TOO_LARGE
