"""Read from a DICOM header how pixel values map to grey levels and colours."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from medspark.images.header import numbers, text
from medspark.images.pixeldata import ImagePixel
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Grey, Stored, Table, Voi


def grey_of(header: Dataset, shape: ImagePixel, index: int) -> Grey:
    """Return the modality, VOI and padding settings of frame ``index``."""
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
            sequence = group.get(keyword)
            if sequence:
                return sequence[0]  # type: ignore[no-any-return]
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
    # The first mapped value is signed if the pixels are (C.11.1.1.1).
    return Table(first - 65536 if signed and first > 32767 else first, values, bits)


def _padding(header: Dataset) -> tuple[float, float] | None:
    """Return the range of stored values that are padding, or None (PS3.3 C.7.5.1.1.2)."""
    value = numbers(header, "PixelPaddingValue")
    if not value:
        return None
    limit = numbers(header, "PixelPaddingRangeLimit") or value
    return min(value[0], limit[0]), max(value[0], limit[0])


def to_rgb(
    stored: Stored, header: Dataset, shape: ImagePixel, photometric: str
) -> tuple[Stored, int]:
    """Return RGB values and their bits (palettes: PS3.3 C.7.6.3.1.5, C.7.9).

    Raises Unreadable for any other photometric interpretation.
    """
    if photometric == "PALETTE COLOR":
        rgb = apply_color_lut(stored, header)
        return rgb[..., :3], 8 * rgb.dtype.itemsize
    if photometric == "RGB":
        return stored, shape.bits_stored
    raise Unreadable(Reason.UNSUPPORTED_PHOTOMETRIC)


def pixel_aspect(header: Dataset) -> float:
    """Return the height of a pixel divided by its width (PS3.3 C.7.6.3.1.7, 10.7.1.3)."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        values = numbers(header, keyword)
        if len(values) == 2 and min(values) > 0 and 0.1 < values[0] / values[1] < 10:
            return values[0] / values[1]
    return 1.0
