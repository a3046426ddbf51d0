"""Eight malicious files, each with the acceptable reasons for its refusal."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from medspark.images.reasons import Reason


def bombs() -> dict[str, tuple[bytes, set[Reason]]]:
    """Return the content of every file by name, and the acceptable reasons."""
    header = _png(65535, 65535, 8, b"")
    inflates = _png(6000, 6000, 16, zlib.compress(bytes(6000 * 12001), 9))
    codestream = b"\xff\x4f" + _siz(60000, 60000) + bytes(600)
    plain = _dicom()
    claims = plain[: plain.index(b"\xe0\x7f\x10\x00")] + b"\x42\x01\x02\x10OB\0\0"
    return {
        "header.png": (header, {Reason.TOO_LARGE}),
        "inflates.png": (inflates, {Reason.DECOMPRESSION_BOMB, Reason.TOO_LARGE}),
        "large.tiff": (_tiff(12000), {Reason.TOO_LARGE, Reason.DECOMPRESSION_BOMB}),
        "rows.dcm": (_dicom(Rows=65535, Columns=65535), {Reason.TOO_LARGE}),
        "deflated.dcm": (_deflated(), {Reason.DECOMPRESSION_BOMB}),
        "codestream.dcm": (
            _dicom(syntax=JPEG2000Lossless, pixels=encapsulate([codestream])),
            {Reason.INCONSISTENT_HEADER, Reason.TOO_LARGE},
        ),
        "rle.dcm": (
            _dicom(syntax=RLELossless, pixels=encapsulate([b"\xff" * 80])), {Reason.DECODE_FAILED},
        ),
        "claims.dcm": (
            claims + struct.pack("<I", 0xFFFFFFF0),
            {Reason.TRUNCATED, Reason.NO_PIXEL_DATA, Reason.DECODE_FAILED},
        ),
    }  # fmt: skip


def _dicom(
    *, syntax: UID = ExplicitVRLittleEndian, pixels: bytes = bytes(64 * 64), **changes: object
) -> bytes:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    data.Rows = data.Columns = 64
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    for name, value in changes.items():
        setattr(data, name, value)
    data.PixelData = pixels
    data["PixelData"].is_undefined_length = syntax.is_encapsulated
    held = io.BytesIO()
    data.save_as(held, enforce_file_format=True)
    return held.getvalue()


def _deflated() -> bytes:
    # 128 MiB of zeros.
    return _dicom(syntax=DeflatedExplicitVRLittleEndian, pixels=bytes(1 << 27))


def _siz(width: int, height: int) -> bytes:
    size = struct.pack(">HHHIIIIIIIIH", 0xFF51, 41, 0, width, height, 0, 0, width, height, 0, 0, 1)
    return size + bytes([7, 1, 1])


def _png(width: int, height: int, depth: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _tiff(side: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(held, "TIFF", compression="tiff_lzw")
    return held.getvalue()


def write_bombs(folder: Path) -> dict[str, set[Reason]]:
    """Write the files into ``folder``; return the acceptable reasons by file."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, (content, reasons) in bombs().items():
        (folder / name).write_bytes(content)
        expected[name] = reasons
    return expected
