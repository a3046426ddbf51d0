"""Read values of a DICOM header one by one; malformed values count as missing."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

# Value representations (PS3.5 6.2) of text, and of binary numbers with their struct codes.
_TEXT = frozenset((
    "AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR",
    "UT",
))  # fmt: skip
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


def text(header: Dataset, keyword: str) -> str:
    """Return the first value of ``keyword`` as clean text, empty if there is none."""
    values = texts(header, keyword)
    return values[0] if values else ""


def texts(header: Dataset, keyword: str) -> list[str]:
    """Return all values of ``keyword`` as clean text."""
    tag, vr = _lookup(keyword)
    element = header.get_item(tag)
    if element is None:
        return []
    if isinstance(element, RawDataElement):
        # Most values are plain ASCII, for which pydicom's conversion takes ten times as long.
        raw = element.value
        if (element.VR or vr) in _TEXT and raw and raw.isascii() and b"\x1b" not in raw:
            return [clean(word) for word in raw.decode("ascii").split("\\")]
    value = header[tag].value
    if value is None:
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        value = [value]
    return [clean(str(one)) for one in value]


def numbers(header: Dataset, keyword: str) -> list[float]:
    """Return all values of ``keyword`` that are finite numbers."""
    tag, vr = _lookup(keyword)
    element = header.get_item(tag)
    if element is None:
        return []
    code = _BINARY.get(element.VR or vr) if isinstance(element, RawDataElement) else None
    if code and isinstance(element, RawDataElement) and element.value is not None:
        order = "<" if element.is_little_endian else ">"
        whole = len(element.value) // struct.calcsize(code)
        values: Iterable[float] = struct.unpack_from(f"{order}{whole}{code}", element.value)
    else:
        values = map(_number, texts(header, keyword))
    return [float(value) for value in values if math.isfinite(value)]


def coded(header: Dataset, keyword: str, terms: Iterable[str]) -> str | None:
    """Return the value of ``keyword`` in upper case if it is one of ``terms``, else None."""
    value = text(header, keyword).upper()
    return value if value in terms else None


def clean(value: str) -> str:
    """Return ``value`` without the padding of PS3.5 6.2."""
    return value.replace("\0", "").strip()


@functools.cache
def _lookup(keyword: str) -> tuple[int, str]:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag, dictionary_VR(tag)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
