"""Detect the kind of a file from its first bytes; all of medspark uses this one function."""

from __future__ import annotations

from enum import Enum

__all__ = ["HEAD_BYTES", "Content", "content_of"]

HEAD_BYTES = 1024  # bytes of a file, enough for all decisions before it is parsed

_RASTER = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# DICOM without a preamble: the first element has group 0002 or 0008, in either byte order.
_DICOM = (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x02")


class Content(Enum):
    """The kinds of files that medspark decodes, each with a separate module."""

    DICOM = "dicom"
    RASTER = "raster"  # PNG, JPEG, TIFF or BMP


def content_of(head: bytes) -> Content | None:
    """Return the kind of a file from ``head``, its first 132 bytes or more; None if unknown.

    The prefix DICM (PS3.10 7.1) is checked first: the preamble may be the head of a TIFF file.
    """
    if head[128:132] == b"DICM":
        return Content.DICOM
    if head.startswith(_RASTER):
        return Content.RASTER
    return Content.DICOM if len(head) >= 8 and head.startswith(_DICOM) else None
