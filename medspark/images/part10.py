"""Parse DICOM files (PS3.10): the header and the position of the pixels, with bounds on both."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from medspark.images.header import text
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable

_PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData",
               0x7FE00010: "PixelData"}  # fmt: skip
_LARGE_ELEMENT = 1 << 24  # bytes; larger elements are skipped, not read
_UNDEFINED = 0xFFFFFFFF
# Transfer syntaxes of uncompressed pixels, which need no decoder.
_NATIVE = frozenset(
    (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
)
_SYNTAX = re.compile(rb"\x02\0\x10\0UI.\0([0-9.]+)", re.DOTALL)
_PLAIN_HEADER = 1 << 18  # bytes; a header of this size parses within a second, in little memory


@dataclass(frozen=True, slots=True)
class DicomFile:
    """A parsed header, and the position of its pixels in ``file``."""

    header: Dataset
    file: BinaryIO
    syntax: uid.UID
    keyword: str
    vr: str
    start: int  # offset of the pixel element's value
    length: int  # bytes of the value that the file has


class NotPlain(Exception):  # noqa: N818 - control flow, not an error
    """The file needs a native decoder, or is too large for this process: see ``decode``."""


def looks_plain(head: bytes) -> bool:
    """Return whether the meta information in ``head``, of a DICOM file, has a native syntax."""
    syntax = _SYNTAX.search(head)
    return syntax is not None and syntax[1].decode() in _NATIVE


class _Bounded(io.RawIOBase):
    """A file that limits reads to its remaining bytes: a claim of 4 GB allocates nothing."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size is None or size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def parse_plain(file: BinaryIO, size: int) -> DicomFile:
    """Return the header of ``file`` if it is short and its pixels are native, else raise NotPlain.

    Raises EOFError or struct.error if the header is damaged.
    """
    window = io.BytesIO(file.read(_PLAIN_HEADER))
    meta = _read_meta(window)
    syntax = uid.UID(text(meta, "TransferSyntaxUID"))
    if syntax not in _NATIVE:
        raise NotPlain
    try:
        header = read_dataset(
            window, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=_at_pixels
        )
    except (EOFError, struct.error):
        if size <= _PLAIN_HEADER:
            raise
        raise NotPlain from None
    if window.tell() + 12 > _PLAIN_HEADER:
        raise NotPlain
    file.seek(window.tell())
    return _with_pixels(header, file, size, syntax)


def _read_meta(stream: Any) -> Dataset:
    """Return the file meta information (PS3.10 7.1); ``stream`` then stands after it."""
    stream.seek(132 if stream.read(132)[128:] == b"DICM" else 0)
    return read_dataset(stream, False, True, stop_when=_past_meta)


def parse(file: BinaryIO, size: int, limits: Limits) -> DicomFile:
    """Return the header of ``file``, read up to its pixels. Raises Unreadable."""
    stream: Any = file if isinstance(file, io.BytesIO) else _Bounded(file, size)
    meta = _read_meta(stream)
    syntax = uid.UID(text(meta, "TransferSyntaxUID"))
    if not syntax:
        raise Unreadable(Reason.NO_FILE_META)
    if text(meta, "MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        raise Unreadable(Reason.NO_PIXEL_DATA, "a DICOMDIR lists files and has no pixels")
    if syntax not in uid.AllTransferSyntaxes:
        raise Unreadable(Reason.UNSUPPORTED_TRANSFER_SYNTAX)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        stream = _inflated(stream.read(), limits)
        size = stream.getbuffer().nbytes
    header = read_dataset(
        stream,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=_at_pixels,
        defer_size=_LARGE_ELEMENT,
    )
    return _with_pixels(header, stream, size, syntax)


def _past_meta(tag: int, vr: str | None, length: int) -> bool:  # noqa: ARG001
    return tag >> 16 != 0x0002


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:  # noqa: ARG001
    return tag in _PIXEL_TAGS


def _inflated(compressed: bytes, limits: Limits) -> io.BytesIO:
    """Return a deflated data set (PS3.5 A.5) inflated, within limits."""
    allowed = min(limits.file_bytes, max(1 << 26, int(len(compressed) * limits.expansion)))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(compressed, allowed)
    except zlib.error:
        raise Unreadable(Reason.DECODE_FAILED, "the deflated data set is damaged") from None
    if inflater.unconsumed_tail:
        raise Unreadable(Reason.DECOMPRESSION_BOMB, f"inflates beyond {allowed} bytes")
    if not inflater.eof:
        raise Unreadable(Reason.TRUNCATED, "the deflated data set ends early")
    return io.BytesIO(plain)


def _with_pixels(header: Dataset, stream: Any, size: int, syntax: uid.UID) -> DicomFile:
    """Return the DicomFile whose pixel element begins at the position of ``stream`` (PS3.5 7.1)."""
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    head = stream.read(12)
    if len(head) < 8:
        raise Unreadable(Reason.TRUNCATED if _ends_early(header) else Reason.NO_PIXEL_DATA)
    group, element = struct.unpack(f"{order}HH", head[:4])
    keyword = _PIXEL_TAGS.get(group << 16 | element)
    if keyword is None:
        # The reader stopped early, at an element that it could not parse.
        raise Unreadable(Reason.TRUNCATED, "the header cannot be read to its end")
    at = stream.tell() - len(head)
    if syntax == uid.ImplicitVRLittleEndian or not head[4:6].isalpha():
        vr, length, start = "OW", struct.unpack(f"{order}I", head[4:8])[0], at + 8
    elif len(head) == 12:
        vr, length, start = head[4:6].decode(), struct.unpack(f"{order}I", head[8:])[0], at + 12
    else:
        raise Unreadable(Reason.TRUNCATED)
    return DicomFile(header, stream, syntax, keyword, vr, start, min(length, size - start))


def _ends_early(header: Dataset) -> bool:
    """Return whether the last element claims more bytes than the file had left."""
    if not header:
        return True
    last = header.get_item(max(header.keys()), keep_deferred=True)
    return (
        isinstance(last, RawDataElement)
        and last.value is not None
        and last.length != _UNDEFINED
        and len(last.value) < last.length
    )
