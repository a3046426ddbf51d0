"""DICOM files to frames: header within limits, pixels frame by frame, rendered as PS3 says."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import gdcm
import jpeg_ls
import numpy as np
import PIL
import pydicom
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut

from medspark.images.codestream import read_codestream
from medspark.images.deidentify import (
    PHOTOMETRICS,
    Privacy,
    Pseudonyms,
    check_burned_in,
    kept_attributes,
)
from medspark.images.frame import Attributes, Frame, sha256_of
from medspark.images.header import numbers, text
from medspark.images.limits import Limits
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import (
    Grey,
    Rendering,
    Stored,
    Table,
    Voi,
    render_colour,
    render_grey,
)

gdcm.Trace.WarningOff()  # it writes to standard error, past every logger
gdcm.Trace.ErrorOff()

_PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData",
               0x7FE00010: "PixelData"}  # fmt: skip
_LARGE_ELEMENT = 1 << 24  # bytes; larger elements are skipped over, not read
_UNDEFINED = 0xFFFFFFFF

# Permissive decoders by transfer syntax, the first that can decode it wins. Speed and exactness of
# each were measured on 2048 x 2048 pixels: JPEG-LS 85 ms with pyjpegls and 170 with GDCM, JPEG 2000
# 358 ms with GDCM and 495 with Pillow.
_PLUGINS: dict[str, tuple[str, ...]] = {
    uid.RLELossless: ("pydicom",),
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("pyjpegls", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    uid.JPEG2000Lossless: ("gdcm", "pillow"),
    uid.JPEG2000: ("gdcm", "pillow"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
}
_VERSIONS = {
    "pydicom": pydicom.__version__,
    "gdcm": gdcm.Version.GetVersion(),
    "pyjpegls": jpeg_ls.__version__,
    "pillow": PIL.__version__,
    "pylibjpeg": "openjpeg",
}
# Pixels as they are: what needs no decoder.
_NATIVE = frozenset(
    (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
)
_SYNTAX = re.compile(rb"\x02\0\x10\0UI.\0([0-9.]+)", re.DOTALL)
_PLAIN_HEADER = 1 << 18  # bytes; what a parser can make of them fits in memory and in a second
_GREYS = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True, slots=True)
class _Object:
    """A parsed header, and where in ``file`` its pixels are."""

    header: Dataset
    file: BinaryIO
    syntax: uid.UID
    keyword: str
    vr: str
    start: int  # of the pixel element's value
    length: int  # of the value in bytes, as far as the file has it
    complete: bool  # the file has all bytes that the element claims


@dataclass(frozen=True, slots=True)
class _Shape:
    """The Image Pixel module's dimensions (PS3.3 C.7.6.3), checked."""

    rows: int
    columns: int
    frames: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    planar: int
    photometric: str

    @property
    def frame_bits(self) -> int:
        """Bits of one native frame."""
        bits = self.rows * self.columns * self.samples * self.bits_allocated
        return bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits


def looks_like_dicom(head: bytes) -> bool:
    """Return whether ``head``, a file's first bytes, begin a DICOM file, with preamble or not."""
    if head[128:132] == b"DICM":
        return True
    # Without a preamble: a first element of group 0002 or 0008, in either byte order.
    return len(head) >= 8 and head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x02")


class NotPlain(Exception):  # noqa: N818 - control flow, not an error
    """The file needs more than Python and NumPy: see ``decode``."""


def looks_plain(head: bytes) -> bool:
    """Return whether ``head`` begins a DICOM file whose meta information says: not compressed."""
    found = _SYNTAX.search(head)
    return found is not None and found[1].decode() in _NATIVE


def decode_dicom(
    file: BinaryIO,
    size: int,
    *,
    rendering: Rendering,
    limits: Limits,
    privacy: Privacy,
    pseudonyms: Pseudonyms | None,
    plain_only: bool = False,
) -> Iterator[Frame]:
    """Yield the frames of the DICOM ``file`` of ``size`` bytes that ``rendering`` asks for.

    Only one frame is in memory at a time. Raises Unreadable, and with ``plain_only`` NotPlain.
    """
    parsed = _parse_plain(file, size) if plain_only else _parse(file, size, limits)
    shape = _shape(parsed)
    limits.check_frame(shape.rows, shape.columns, shape.frames)
    check_burned_in(parsed.header, privacy)
    kept = kept_attributes(parsed.header, pseudonyms)
    aspect = _pixel_aspect(parsed.header)
    chosen = rendering.chosen_frames(shape.frames)
    for index, stored, photometric, decoder in _stored_frames(parsed, shape, chosen, limits):
        if photometric in _GREYS:
            grey = _grey(parsed.header, shape, index)
            pixels, rendered = render_grey(stored, grey, rendering, aspect=aspect)
        else:
            colour, bits = _to_rgb(stored, parsed.header, shape, photometric)
            pixels, rendered = render_colour(colour, bits, rendering, aspect=aspect)
        attributes = Attributes(
            file_format="dicom",
            rows=shape.rows,
            columns=shape.columns,
            frames=shape.frames,
            samples_per_pixel=shape.samples,
            bits_stored=shape.bits_stored,
            signed=shape.signed,
            photometric=shape.photometric,
            transfer_syntax=str(parsed.syntax),
            decoder=decoder,
            **kept,
        )
        digest = sha256_of(stored, photometric)
        yield Frame(pixels, index + 1, digest, attributes, rendered)


def stored_frames(file: BinaryIO, size: int, *, limits: Limits) -> Iterator[Stored]:
    """Yield every frame's stored values, before any rendering: what a reference is compared with.

    YBR frames come as RGB and the values of PALETTE COLOR as indices. Raises Unreadable.
    """
    parsed = _parse(file, size, limits)
    shape = _shape(parsed)
    limits.check_frame(shape.rows, shape.columns, shape.frames)
    for _, stored, _, _ in _stored_frames(parsed, shape, list(range(shape.frames)), limits):
        yield stored


# --- header -----------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """A file that never asks for more than it has: a 4 GB element claim costs nothing."""

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


def _parse_plain(file: BinaryIO, size: int) -> _Object:
    """Return the header of ``file`` if it is short and its pixels are not compressed."""
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
    """Return the file meta information (PS3.10 7.1), and leave ``stream`` behind it."""
    stream.seek(132 if stream.read(132)[128:] == b"DICM" else 0)
    return read_dataset(stream, False, True, stop_when=_past_meta)


def _parse(file: BinaryIO, size: int, limits: Limits) -> _Object:
    """Return the header of ``file``, read up to its pixels."""
    stream: Any = file if isinstance(file, io.BytesIO) else _Bounded(file, size)
    meta = _read_meta(stream)
    syntax = uid.UID(text(meta, "TransferSyntaxUID"))
    if not syntax:
        raise Unreadable(Reason.NO_FILE_META)
    if text(meta, "MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        raise Unreadable(Reason.NO_PIXEL_DATA, "a DICOMDIR lists files and has no pixels")
    if syntax not in _PLUGINS and syntax not in uid.UncompressedTransferSyntaxes:
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
    """Return a deflated data set (PS3.5 A.5) as it was, within limits."""
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


def _with_pixels(header: Dataset, stream: Any, size: int, syntax: uid.UID) -> _Object:
    """Return the object whose pixel element begins where ``stream`` stands (PS3.5 7.1)."""
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    head = stream.read(12)
    if len(head) < 8:
        raise Unreadable(Reason.TRUNCATED if _ends_early(header) else Reason.NO_PIXEL_DATA)
    group, element = struct.unpack(f"{order}HH", head[:4])
    keyword = _PIXEL_TAGS.get(group << 16 | element)
    if keyword is None:
        # The reader met something that it could not parse and stopped early.
        raise Unreadable(Reason.TRUNCATED, "the header cannot be read to its end")
    if syntax == uid.ImplicitVRLittleEndian or not head[4:6].isalpha():
        vr, length, start = (
            "OW",
            struct.unpack(f"{order}I", head[4:8])[0],
            stream.tell() - len(head) + 8,
        )
    elif len(head) == 12:
        vr, length, start = (
            head[4:6].decode(),
            struct.unpack(f"{order}I", head[8:])[0],
            stream.tell(),
        )
    else:
        raise Unreadable(Reason.TRUNCATED)
    left = size - start
    complete = length == _UNDEFINED or length <= left
    return _Object(header, stream, syntax, keyword, vr, start, min(length, left), complete)


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


def _shape(parsed: _Object) -> _Shape:
    header = parsed.header
    photometric = text(header, "PhotometricInterpretation").upper()
    if not photometric:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "PhotometricInterpretation is missing")
    if photometric not in PHOTOMETRICS:
        raise Unreadable(Reason.UNSUPPORTED_PHOTOMETRIC)
    samples = _whole(header, "SamplesPerPixel", 1)
    if samples != (1 if photometric in (*_GREYS, "PALETTE COLOR") else 3):
        raise Unreadable(
            Reason.INCONSISTENT_HEADER,
            "samples per pixel do not fit the photometric interpretation",
        )
    floating = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(parsed.keyword)
    allocated = floating or _whole(header, "BitsAllocated")
    stored = floating or _whole(header, "BitsStored", allocated)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "impossible bits allocated or stored")
    return _Shape(
        rows=_whole(header, "Rows"),
        columns=_whole(header, "Columns"),
        frames=_whole(header, "NumberOfFrames", 1) or 1,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=_whole(header, "PixelRepresentation", 0) == 1,
        planar=_whole(header, "PlanarConfiguration", 0),
        photometric=photometric,
    )


def _whole(header: Dataset, keyword: str, default: int | None = None) -> int:
    values = numbers(header, keyword)
    if not values and default is not None:
        return default
    if len(values) != 1 or values[0] != int(values[0]) or values[0] < 0:
        raise Unreadable(Reason.INCONSISTENT_HEADER, f"{keyword} is missing or impossible")
    return int(values[0])


def _pixel_aspect(header: Dataset) -> float:
    """Return the height of a pixel over its width (PS3.3 C.7.6.3.1.7, 10.7.1.3)."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        values = numbers(header, keyword)
        if len(values) == 2 and min(values) > 0 and 0.1 < values[0] / values[1] < 10:
            return values[0] / values[1]
    return 1.0


# --- pixels -----------------------------------------------------------------------------------


def _stored_frames(
    parsed: _Object, shape: _Shape, chosen: list[int], limits: Limits
) -> Iterator[tuple[int, Stored, str, str]]:
    """Yield (index, stored values, photometric interpretation after decoding, decoder)."""
    if parsed.syntax in _PLUGINS:
        return _encapsulated(parsed, shape, chosen, limits)
    return _native(parsed, shape, chosen)


def _options(parsed: _Object, shape: _Shape) -> dict[str, Any]:
    options: dict[str, Any] = {
        "rows": shape.rows,
        "columns": shape.columns,
        "samples_per_pixel": shape.samples,
        "bits_allocated": shape.bits_allocated,
        "photometric_interpretation": shape.photometric,
        "pixel_keyword": parsed.keyword,
        "pixel_vr": parsed.vr,
        "number_of_frames": shape.frames,
    }
    if parsed.keyword == "PixelData":
        options |= {
            "bits_stored": shape.bits_stored,
            "pixel_representation": int(shape.signed),
            "planar_configuration": shape.planar,
        }
    return options


def _native(
    parsed: _Object, shape: _Shape, chosen: list[int]
) -> Iterator[tuple[int, Stored, str, str]]:
    needed = -(-shape.frame_bits * shape.frames // 8)
    if parsed.length < needed:
        raise Unreadable(
            Reason.TRUNCATED, f"{needed} bytes of pixels are needed, {parsed.length} are there"
        )
    parsed.file.seek(parsed.start)
    frames = get_decoder(parsed.syntax).iter_array(
        parsed.file, indices=chosen, **_options(parsed, shape)
    )
    decoder = f"pydicom {pydicom.__version__}"
    for index, (stored, properties) in zip(chosen, frames, strict=True):
        # pydicom leaves big-endian values as they are in the file.
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        yield index, native, str(properties["photometric_interpretation"]), decoder


def _encapsulated(
    parsed: _Object, shape: _Shape, chosen: list[int], limits: Limits
) -> Iterator[tuple[int, Stored, str, str]]:
    """Yield frames of encapsulated pixel data (PS3.5 A.4), each checked before it is decoded."""
    _check_fragments(parsed)
    parsed.file.seek(parsed.start)
    streams = generate_frames(
        parsed.file,
        number_of_frames=shape.frames,
        extended_offsets=_extended_offsets(parsed.header),
    )
    wanted, last = set(chosen), chosen[-1]
    found = 0
    for index, stream in enumerate(streams):
        if index in wanted:
            _check_stream(stream, parsed, shape, limits)
            yield index, *_decompressed(stream, parsed, shape)
            found += 1
        if index >= last:
            break
    if found < len(chosen):
        raise Unreadable(Reason.TRUNCATED, f"{shape.frames} frames are claimed, {found} found")


def _check_fragments(parsed: _Object) -> None:
    """Raise Unreadable unless the file has every byte that its fragments claim."""
    end = parsed.start + parsed.length
    at = parsed.start
    while at + 8 <= end:
        parsed.file.seek(at)
        group, element, length = struct.unpack("<HHI", parsed.file.read(8))
        if (group, element) == (0xFFFE, 0xE0DD):
            return
        if (group, element) != (0xFFFE, 0xE000):
            raise Unreadable(Reason.DECODE_FAILED, "the fragments of the pixels are damaged")
        at += 8 + length
    raise Unreadable(Reason.TRUNCATED, "the file ends before the delimiter of its pixels")


def _extended_offsets(header: Dataset) -> tuple[bytes, bytes] | None:
    offsets = header.get("ExtendedOffsetTable")
    lengths = header.get("ExtendedOffsetTableLengths")
    return (offsets, lengths) if offsets and lengths else None


def _check_stream(stream: bytes, parsed: _Object, shape: _Shape, limits: Limits) -> None:
    """Raise Unreadable if the codestream's own header does not fit the file's."""
    limits.check_expansion(len(stream), shape.frame_bits // 8)
    if parsed.syntax == uid.RLELossless:
        return
    found = read_codestream(stream)
    if found is None:
        raise Unreadable(Reason.DECODE_FAILED, "no JPEG or JPEG 2000 header in the pixels")
    if (found.rows, found.columns) != (shape.rows, shape.columns):
        raise Unreadable(
            Reason.INCONSISTENT_HEADER,
            f"the header says {shape.rows} x {shape.columns}, "
            f"the pixels say {found.rows} x {found.columns}",
        )
    if found.components != shape.samples:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "samples per pixel differ in the pixels")
    if not found.conformant:
        raise Unreadable(Reason.DECODE_FAILED, "the scan does not fit the JPEG process")
    if parsed.syntax == uid.JPEGExtended12Bit and found.precision != 8:
        raise Unreadable(Reason.GPL_DECODER_ONLY)


def _decompressed(stream: bytes, parsed: _Object, shape: _Shape) -> tuple[Stored, str, str]:
    options = _options(parsed, shape) | {"number_of_frames": 1}
    decoder = get_decoder(parsed.syntax)
    for plugin in _PLUGINS[parsed.syntax]:
        try:
            stored, properties = decoder.as_array(
                encapsulate([stream]), index=0, decoding_plugin=plugin, **options
            )
        except RuntimeError:  # how pydicom says that a plugin could not decode
            continue
        photometric = str(properties["photometric_interpretation"])
        return stored, photometric, f"{plugin} {_VERSIONS[plugin]}"
    raise Unreadable(Reason.DECODE_FAILED)


def _to_rgb(stored: Stored, header: Dataset, shape: _Shape, photometric: str) -> tuple[Stored, int]:
    """Return RGB values and their bits (palettes: PS3.3 C.7.6.3.1.5, C.7.9)."""
    if photometric == "PALETTE COLOR":
        rgb = apply_color_lut(stored, header)
        return rgb[..., :3], 8 * rgb.dtype.itemsize
    if photometric == "RGB":
        return stored, shape.bits_stored
    raise Unreadable(Reason.UNSUPPORTED_PHOTOMETRIC)


# --- grey scale -------------------------------------------------------------------------------


def _grey(header: Dataset, shape: _Shape, index: int) -> Grey:
    """Return what the file says about the grey values of frame ``index``."""
    modality = _group(header, "PixelValueTransformationSequence", index)
    voi = _group(header, "FrameVOILUTSequence", index)
    slope, intercept = _first(modality, "RescaleSlope", 1.0), _first(modality, "RescaleIntercept")
    return Grey(
        bits_stored=shape.bits_stored,
        signed=shape.signed,
        slope=slope or 1.0,
        intercept=intercept,
        modality_lut=_table(modality, "ModalityLUTSequence", shape.signed),
        voi=_voi(voi),
        voi_lut=_table(voi, "VOILUTSequence", shape.signed),
        padding=_padding(header),
        inverted=shape.photometric == "MONOCHROME1",
        hounsfield=text(header, "Modality") == "CT" and text(modality, "RescaleType") in ("", "HU"),
    )


def _group(header: Dataset, keyword: str, index: int) -> Dataset:
    """Return the functional group of frame ``index`` (PS3.3 C.7.6.16.1), else the header itself."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for groups in ([per_frame[index]] if index < len(per_frame) else []), shared[:1]:
        for group in groups:
            found = group.get(keyword)
            if found:
                return found[0]  # type: ignore[no-any-return]
    return header


def _first(header: Dataset, keyword: str, default: float = 0.0) -> float:
    values = numbers(header, keyword)
    return values[0] if values else default


def _voi(header: Dataset) -> Voi | None:
    """Return the first window of the file (PS3.3 C.11.2.1.2)."""
    centre, width = numbers(header, "WindowCenter"), numbers(header, "WindowWidth")
    function = text(header, "VOILUTFunction").upper() or "LINEAR"
    if not centre or not width or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    if width[0] < 1 if function == "LINEAR" else width[0] <= 0:
        return None
    return Voi(centre[0], width[0], function)


def _table(header: Dataset, keyword: str, signed: bool) -> Table | None:
    """Return the first table of the sequence ``keyword`` (PS3.3 C.11.1.1, C.11.2.1.1)."""
    sequence = header.get(keyword)
    if not sequence:
        return None
    item = sequence[0]
    descriptor = numbers(item, "LUTDescriptor")
    if len(descriptor) != 3:
        return None
    entries, first, bits = int(descriptor[0]) or 65536, int(descriptor[1]), int(descriptor[2])
    raw = item.get("LUTData")
    if isinstance(raw, bytes):
        raw = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
    values = np.asarray(raw, np.float64).ravel()[:entries]
    if not values.size or not 1 <= bits <= 16:
        return None
    # The first mapped value is signed where the pixels are (C.11.1.1.1).
    return Table(first - 65536 if signed and first > 32767 else first, values, bits)


def _padding(header: Dataset) -> tuple[float, float] | None:
    """Return the stored values that are padding (PS3.3 C.7.5.1.1.2)."""
    value = numbers(header, "PixelPaddingValue")
    if not value:
        return None
    limit = numbers(header, "PixelPaddingRangeLimit") or value
    return min(value[0], limit[0]), max(value[0], limit[0])
