"""Read the header of a JPEG, JPEG-LS or JPEG 2000 codestream without decoding it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

# Frame headers SOF0-SOF15 of ITU-T T.81 without DHT, JPG and DAC, and SOF55 of JPEG-LS (T.87).
_SOF = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_SOS = 0xDA
_STANDALONE = frozenset({0x01, *range(0xD0, 0xDA)})


@dataclass(frozen=True, slots=True)
class Codestream:
    """Dimensions and sample format from a codestream's header."""

    rows: int
    columns: int
    components: int
    precision: int  # bits per sample
    signed: bool = False
    conformant: bool = True  # judged from the headers only


def read_codestream(data: bytes) -> Codestream | None:
    """Return the header of a JPEG, JPEG-LS or JPEG 2000 stream, None if ``data`` is not one."""
    if data[:2] == b"\xff\xd8":
        return _read_jpeg(data)
    start = data.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC and SIZ, possibly inside a JP2 box
    return _read_j2k(data, start) if start >= 0 else None


def _read_jpeg(data: bytes) -> Codestream | None:
    frame: Codestream | None = None
    for marker, at in _segments(data):
        if marker in _SOF and at + 8 <= len(data):
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 2)
            frame = Codestream(rows, columns, components, precision)
            if marker not in _SEQUENTIAL:
                return frame
        elif marker == _SOS and frame and at + 2 < len(data):
            # A sequential scan has all 64 coefficients (T.81 table B.3).
            spectrum = at + 3 + 2 * data[at + 2]
            return replace(frame, conformant=data[spectrum : spectrum + 2] == b"\x00\x3f")
    return frame


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of a JPEG stream and the offset of its segment (T.81 B.1.1)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte, B.1.1.2
            at += 1
        elif marker in _STANDALONE:
            at += 2
        else:
            yield marker, at + 2
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _read_j2k(data: bytes, start: int) -> Codestream | None:
    """Read the SIZ marker segment (ITU-T T.800 A.5.1)."""
    if start + 42 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    # Ssiz of the first component: sign in the highest bit, then precision minus 1 (table A.11).
    size = data[start + 42] if start + 42 < len(data) else 0
    return Codestream(bottom - top, right - left, components, (size & 0x7F) + 1, bool(size >> 7))
