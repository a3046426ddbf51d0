"""Read the pixels of a DICOM file frame by frame, with permissively licensed decoders only."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gdcm
import jpeg_ls
import PIL
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder

from medspark.images.codestream import Codestream, read_codestream
from medspark.images.deidentify import PHOTOMETRICS
from medspark.images.header import numbers, text
from medspark.images.limits import Limits
from medspark.images.part10 import DicomFile
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Stored

gdcm.Trace.WarningOff()  # GDCM writes to standard error, not to a logger
gdcm.Trace.ErrorOff()

# Permissive decoders by transfer syntax; the first one that can decode a frame is used. The order
# follows measured speed and exactness. JPEG-LS of 2048 x 2048 pixels takes 85 ms with pyjpegls and
# 170 ms with GDCM. All JPEG 2000 decoders use OpenJPEG: 2.5 in Pillow and pylibjpeg (50 ms of CPU
# time for 512 x 512 lossless pixels of 16 bits), and 2.3 in GDCM (55 ms on two threads, and damaged
# files crash it).
_PLUGINS: dict[str, tuple[str, ...]] = {
    uid.RLELossless: ("pydicom",),
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("pyjpegls", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    uid.JPEG2000Lossless: ("pillow", "pylibjpeg"),
    uid.JPEG2000: ("pillow", "pylibjpeg"),
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
GREYS = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True, slots=True)
class ImagePixel:
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
    def channels(self) -> int:
        """Channels of a decoded frame: 3 for a palette, whose indices become colours."""
        return 3 if self.photometric == "PALETTE COLOR" else self.samples

    @property
    def frame_bits(self) -> int:
        """Bits of one native frame."""
        bits = self.rows * self.columns * self.samples * self.bits_allocated
        return bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits


def image_pixel(parsed: DicomFile) -> ImagePixel:
    """Return the checked Image Pixel module. Raises Unreadable if it is inconsistent."""
    header = parsed.header
    photometric = text(header, "PhotometricInterpretation").upper()
    if not photometric:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "PhotometricInterpretation is missing")
    if photometric not in PHOTOMETRICS:
        raise Unreadable(Reason.UNSUPPORTED_PHOTOMETRIC)
    samples = _whole(header, "SamplesPerPixel", 1)
    if samples != (1 if photometric in (*GREYS, "PALETTE COLOR") else 3):
        raise Unreadable(
            Reason.INCONSISTENT_HEADER,
            "samples per pixel do not match the photometric interpretation",
        )
    floating = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(parsed.keyword)
    allocated = floating or _whole(header, "BitsAllocated")
    stored = floating or _whole(header, "BitsStored", allocated)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "impossible bits allocated or stored")
    return ImagePixel(
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


def frames_of(
    parsed: DicomFile, shape: ImagePixel, chosen: list[int], limits: Limits
) -> Iterator[tuple[int, Stored, str, str]]:
    """Yield (index, stored values, photometric interpretation after decoding, decoder)."""
    if parsed.syntax in _PLUGINS:
        return _encapsulated(parsed, shape, chosen, limits)
    if parsed.syntax not in uid.UncompressedTransferSyntaxes:
        raise Unreadable(Reason.UNSUPPORTED_TRANSFER_SYNTAX)
    return _native(parsed, shape, chosen)


def _options(parsed: DicomFile, shape: ImagePixel) -> dict[str, Any]:
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
    parsed: DicomFile, shape: ImagePixel, chosen: list[int]
) -> Iterator[tuple[int, Stored, str, str]]:
    needed = -(-shape.frame_bits * shape.frames // 8)
    if parsed.length < needed:
        raise Unreadable(
            Reason.TRUNCATED, f"{needed} bytes of pixels are needed, the file has {parsed.length}"
        )
    parsed.file.seek(parsed.start)
    frames = get_decoder(parsed.syntax).iter_array(
        parsed.file, indices=chosen, **_options(parsed, shape)
    )
    decoder = f"pydicom {pydicom.__version__}"
    for index, (stored, properties) in zip(chosen, frames, strict=True):
        # pydicom does not convert big-endian values to native byte order.
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        yield index, native, str(properties["photometric_interpretation"]), decoder


def _encapsulated(
    parsed: DicomFile, shape: ImagePixel, chosen: list[int], limits: Limits
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
    decoded = 0
    for index, stream in enumerate(streams):
        if index in wanted:
            header = _checked(stream, parsed, shape, limits)
            yield index, *_decompressed(stream, header, parsed, shape)
            decoded += 1
        if index >= last:
            break
    if decoded < len(chosen):
        raise Unreadable(Reason.TRUNCATED, f"{shape.frames} frames are claimed, {decoded} found")


def _check_fragments(parsed: DicomFile) -> None:
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


def _checked(
    stream: bytes, parsed: DicomFile, shape: ImagePixel, limits: Limits
) -> Codestream | None:
    """Return the codestream's header, or None for RLE, which has none.

    Raises Unreadable if it does not match the file's header.
    """
    limits.check_expansion(len(stream), shape.frame_bits // 8)
    if parsed.syntax == uid.RLELossless:
        return None
    codestream = read_codestream(stream)
    if codestream is None:
        raise Unreadable(Reason.DECODE_FAILED, "no JPEG or JPEG 2000 header in the pixels")
    if (codestream.rows, codestream.columns) != (shape.rows, shape.columns):
        raise Unreadable(
            Reason.INCONSISTENT_HEADER,
            f"the header says {shape.rows} x {shape.columns}, "
            f"the pixels say {codestream.rows} x {codestream.columns}",
        )
    if codestream.components != shape.samples:
        raise Unreadable(Reason.INCONSISTENT_HEADER, "samples per pixel differ in the pixels")
    if not codestream.conformant:
        raise Unreadable(Reason.DECODE_FAILED, "the scan does not match the JPEG process")
    if parsed.syntax == uid.JPEGExtended12Bit and codestream.precision != 8:
        raise Unreadable(Reason.GPL_DECODER_ONLY)
    return codestream


def _plugins(syntax: str, header: Codestream | None, shape: ImagePixel) -> tuple[str, ...]:
    """Return the decoders to try for a frame, in order.

    For JPEG 2000, Pillow takes the sign of the values from the file's header, so it is skipped if
    the codestream has another sign. Pillow itself refuses colours of more than 8 bits.
    """
    if header is None or syntax not in (uid.JPEG2000, uid.JPEG2000Lossless):
        return _PLUGINS[syntax]
    return _PLUGINS[syntax] if header.signed == shape.signed else ("pylibjpeg",)


def _decompressed(
    stream: bytes, header: Codestream | None, parsed: DicomFile, shape: ImagePixel
) -> tuple[Stored, str, str]:
    options = _options(parsed, shape) | {"number_of_frames": 1}
    decoder = get_decoder(parsed.syntax)
    for plugin in _plugins(parsed.syntax, header, shape):
        try:
            stored, properties = decoder.as_array(
                encapsulate([stream]), index=0, decoding_plugin=plugin, **options
            )
        except RuntimeError:  # pydicom raises it if a plugin cannot decode
            continue
        photometric = str(properties["photometric_interpretation"])
        return stored, photometric, f"{plugin} {_VERSIONS[plugin]}"
    raise Unreadable(Reason.DECODE_FAILED)
