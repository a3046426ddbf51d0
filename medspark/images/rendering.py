"""Render stored values as pixels for a network: modality, window, inversion, size and depth.

The order follows the grey-scale pipeline of the standard (PS3.3 C.7.6.16, PS3.4 N.2): modality
LUT, VOI, presentation (inversion). Resampling to the network's size comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator

from medspark.config import Bits, Config
from medspark.images.frame import Pixels, Rendered

# Increased whenever the same file and settings give different pixels.
RENDER_VERSION = 1

Window = Literal["dicom", "percentile", "full", "lung", "mediastinum", "bone", "brain", "abdomen"]

# Centre and width in HU, as common on radiology workstations.
PRESETS = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (40.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "abdomen": (60.0, 400.0),
}

Floats = npt.NDArray[np.float64]
Stored = npt.NDArray[Any]

# Percentiles of larger images use a regular grid of at least this many pixels.
_ENOUGH_FOR_PERCENTILES = 1 << 16


def _frames(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdigit() else value


Frames = Annotated[Literal["all", "middle"] | Annotated[int, Field(ge=1)], BeforeValidator(_frames)]


class Rendering(Config):
    """How stored values become pixels."""

    size: int = Field(224, ge=4, le=8192, description="height and width of the output, in pixels")
    keep_aspect: bool = Field(
        False, description="keep the aspect ratio and fill the rest with black"
    )
    window: Window = Field(
        "dicom",
        description="the file's VOI, percentiles, the full range, or a CT preset by name; presets "
        "are in HU and apply to CT only, other images use their file's VOI",
    )
    percentiles: tuple[float, float] = Field(
        (0.5, 99.5), description="black and white of the percentile window, in percent"
    )
    bits: Bits = Field(8, description="bits per output value")
    frames: Frames = Field(
        "all", description="frames of a multi-frame file: all, middle, or N spread evenly"
    )
    colour: Literal["keep", "grey", "rgb"] = Field(
        "keep", description="channels: as stored, always one, or always three"
    )

    @model_validator(mode="after")
    def _percentiles_rise(self) -> Rendering:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError("percentiles should rise, within 0 and 100")
        return self

    def frame_bytes(self, channels: int) -> int:
        """Return the bytes of a rendered frame whose source has 1 or 3 ``channels``."""
        kept = {"keep": channels, "grey": 1, "rgb": 3}[self.colour]
        return self.size * self.size * kept * self.bits // 8

    def chosen_frames(self, frames: int) -> list[int]:
        """Return the indices, from 0, of the frames to keep out of ``frames``."""
        if self.frames == "all":
            return list(range(frames))
        wanted = 1 if self.frames == "middle" else min(self.frames, frames)
        # The middles of ``wanted`` equal stretches, since the ends of a volume are often empty.
        return [int((2 * i + 1) * frames / (2 * wanted)) for i in range(wanted)]


@dataclass(frozen=True, slots=True)
class Table:
    """A lookup table of PS3.3 C.11.1.1 or C.11.2.1.1: ``values[clip(x - first)]``."""

    first: int
    values: Floats
    bits: int

    def __call__(self, x: Floats) -> Floats:
        """Return the table's entries; values outside map to its first or last (C.11.1.1.1)."""
        index = np.clip(np.rint(x) - self.first, 0, len(self.values) - 1)
        entries: Floats = self.values[index.astype(np.intp)]
        return entries


@dataclass(frozen=True, slots=True)
class Voi:
    """A window of PS3.3 C.11.2.1.2."""

    centre: float
    width: float
    function: str = "LINEAR"

    @property
    def bounds(self) -> tuple[float, float]:
        """The values that become black and white (for SIGMOID: the ends of its width)."""
        half = self.width / 2
        if self.function == "LINEAR":
            return self.centre - half, self.centre - 1 + half  # C.11.2.1.2.1
        return self.centre - half, self.centre + half

    def __call__(self, x: Floats) -> Floats:
        """Return ``x`` mapped to [0, 1]."""
        if self.function == "SIGMOID":  # C.11.2.1.3.1
            exponent = np.clip(-4 * (x - self.centre) / self.width, -700, 700)
            return np.asarray(1 / (1 + np.exp(exponent)))
        low, high = self.bounds  # C.11.2.1.2.1, C.11.2.1.3.2
        if high <= low:  # LINEAR of width 1 is a threshold
            return np.asarray((x > low).astype(np.float64))
        return np.asarray(np.clip((x - low) / (high - low), 0, 1))


@dataclass(frozen=True, slots=True)
class Grey:
    """How a file maps one frame's stored values to grey levels."""

    bits_stored: int
    signed: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: Table | None = None
    voi: Voi | None = None
    voi_lut: Table | None = None
    padding: tuple[float, float] | None = None  # stored values, both ends included
    inverted: bool = False  # MONOCHROME1: the lowest value is shown white (C.7.6.3.1.2)
    hounsfield: bool = False

    def modality(self, stored: Floats) -> Floats:
        """Return modality values, e.g. HU (PS3.3 C.11.1)."""
        if self.modality_lut is not None:
            return self.modality_lut(stored)
        return stored * self.slope + self.intercept


def render_grey(
    stored: Stored, grey: Grey, rendering: Rendering, *, aspect: float = 1.0
) -> tuple[Pixels, Rendered]:
    """Return ``stored`` (rows, columns) as network pixels, and a record of the rendering.

    ``aspect`` is the height of a stored pixel divided by its width. The pixels are uint8 or uint16
    of shape (size, size), or (size, size, 3) if ``rendering.colour`` is rgb.
    """
    mapping, window = _mapping(stored, grey, rendering)
    line = _line(stored, grey, mapping, rendering)
    if line is None:
        pixels, box = _fit(_display(stored, grey, mapping, rendering), rendering, aspect)
    else:
        small, box = _fit(stored.astype(np.float32), rendering, aspect)
        pixels = _levels(small * np.float32(line[0]) + np.float32(line[1]), rendering)
        pixels = pixels if box[:2] == pixels.shape[:2] else _blackened(pixels, box)
    if rendering.colour == "rgb":
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    low, high = mapping.bounds if isinstance(mapping, Voi) else (None, None)
    function = mapping.function if isinstance(mapping, Voi) else "LUT"
    return pixels, Rendered(
        RENDER_VERSION, window, low, high, function, grey.inverted, grey.padding is not None, *box
    )


def render_colour(
    stored: Stored, bits_stored: int, rendering: Rendering, *, aspect: float = 1.0
) -> tuple[Pixels, Rendered]:
    """Return ``stored`` (rows, columns, 3) as network pixels, and a record of the rendering.

    Colour has no modality or VOI step (PS3.3 C.7.6.3.1.2): 0 stays 0, and the highest stored value
    becomes the highest output value.
    """
    top = float(2**bits_stored - 1)
    if rendering.bits == 8 and bits_stored == 8 and stored.dtype == np.uint8:
        shown = stored
    else:
        scaled = stored.astype(np.float32) * np.float32((2**rendering.bits - 1) / top)
        np.clip(scaled, 0, 2**rendering.bits - 1, out=scaled)
        shown = np.rint(scaled).astype(_dtype(rendering))
    if rendering.colour == "grey":
        shown = luminance(shown)
    pixels, box = _fit(shown, rendering, aspect)
    return pixels, Rendered(RENDER_VERSION, "full", 0.0, top, "LINEAR_EXACT", False, False, *box)


def luminance(rgb: Stored) -> Stored:
    """Return the luma of ITU-R BT.601 (Y in PS3.3 C.7.6.3.1.2), in the same dtype."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(np.rint(rgb.astype(np.float32) @ weights).astype(rgb.dtype))


def _dtype(rendering: Rendering) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if rendering.bits == 8 else np.uint16


# --- grey levels ------------------------------------------------------------------------------


def _line(
    stored: Stored, grey: Grey, mapping: Voi | Table, rendering: Rendering
) -> tuple[float, float] | None:
    """Return slope and intercept from stored values to levels, or None if values are clipped.

    Averaging commutes with a linear map, so an image without clipping is resized first and windowed
    afterwards, which is exact and faster. Narrow windows, tables and padding return None.
    """
    if isinstance(mapping, Table) or mapping.function == "SIGMOID" or stored.dtype.itemsize > 2:
        return None
    low, high = mapping.bounds
    if grey.modality_lut is not None or grey.padding is not None or high <= low:
        return None
    top = 2**rendering.bits - 1
    slope, intercept = grey.slope * top / (high - low), (grey.intercept - low) * top / (high - low)
    ends = int(stored.min()) * slope + intercept, int(stored.max()) * slope + intercept
    if min(ends) < -0.5 or max(ends) > top + 0.5:
        return None
    return (-slope, top - intercept) if grey.inverted else (slope, intercept)


def _display(stored: Stored, grey: Grey, mapping: Voi | Table, rendering: Rendering) -> Pixels:
    """Return the display values of all stored pixels, before resizing."""
    top = 2**rendering.bits - 1

    def show(x: Floats) -> Pixels:
        levels = np.rint(mapping(grey.modality(x)) * top)
        if grey.inverted:
            levels = top - levels
        if grey.padding is not None:
            # Padding is black background in both polarities (PS3.3 C.7.5.1.1.2).
            levels[(x >= grey.padding[0]) & (x <= grey.padding[1])] = 0
        return cast(Pixels, levels.astype(_dtype(rendering)))

    return _through_table(stored, show) if stored.dtype.itemsize <= 2 else _by_rows(stored, show)


def _levels(values: npt.NDArray[np.float32], rendering: Rendering) -> Pixels:
    rounded = np.rint(np.clip(values, 0, 2**rendering.bits - 1))
    return cast(Pixels, rounded.astype(_dtype(rendering)))


def _blackened(pixels: Pixels, box: tuple[int, ...]) -> Pixels:
    """Return ``pixels`` with everything around ``box`` black."""
    rows, columns, top, left = box
    canvas = np.zeros_like(pixels)
    inside = slice(top, top + rows), slice(left, left + columns)
    canvas[inside] = pixels[inside]
    return canvas


def _mapping(stored: Stored, grey: Grey, rendering: Rendering) -> tuple[Voi | Table, str]:
    """Return the function from modality values to [0, 1], and its name."""
    name: str = rendering.window
    if name in PRESETS and grey.hounsfield:
        return Voi(*PRESETS[name], "LINEAR"), name
    if name in PRESETS:
        name = "dicom"
    if name == "dicom" and grey.voi_lut is not None:
        return _normalised(grey.voi_lut), "dicom_lut"
    if name == "dicom" and grey.voi is not None:
        return grey.voi, "dicom_window"
    # Eight-bit data without a VOI uses the full range; wider data rarely fills its range.
    if name == "full" or (name == "dicom" and stored.dtype.kind in "iu" and grey.bits_stored <= 8):
        return _between(*_full_range(stored, grey)), "full"
    return _between(*_percentiles(stored, grey, rendering.percentiles)), "percentile"


def _normalised(table: Table) -> Table:
    return Table(table.first, table.values / (2**table.bits - 1), table.bits)


def _between(low: float, high: float) -> Voi:
    width = high - low if high > low else 1.0
    return Voi(low + width / 2, width, "LINEAR_EXACT")  # a constant image is black


def _full_range(stored: Stored, grey: Grey) -> tuple[float, float]:
    if stored.dtype.kind == "f":
        ends = np.array([np.nanmin(stored), np.nanmax(stored)], np.float64)
    elif grey.signed:
        ends = np.array([-(2 ** (grey.bits_stored - 1)), 2 ** (grey.bits_stored - 1) - 1], float)
    else:
        ends = np.array([0, 2**grey.bits_stored - 1], float)
    values = grey.modality(ends)
    return float(values.min()), float(values.max())


def _percentiles(
    stored: Stored, grey: Grey, percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Return modality values at ``percentiles`` of the pixels that are not padding.

    A large image is sampled at every n-th row and column, at least 65,536 pixels.
    """
    step = max(1, int((stored.size / _ENOUGH_FOR_PERCENTILES) ** 0.5))
    sample = stored[::step, ::step].ravel()
    if grey.padding is not None:
        inside = sample[(sample < grey.padding[0]) | (sample > grey.padding[1])]
        sample = inside if inside.size else sample
    if sample.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]
        if not sample.size:
            return 0.0, 1.0
    ends = np.sort(sample, kind="stable")[_ranks(sample.size, percentiles)].astype(np.float64)
    values = grey.modality(ends)
    return float(values.min()), float(values.max())


def _ranks(count: int, percentiles: tuple[float, float]) -> list[int]:
    return [round(percent / 100 * (count - 1)) for percent in percentiles]


def _through_table(stored: Stored, show: Callable[[Floats], Pixels]) -> Pixels:
    """Return ``show(stored)``, evaluated once per value between the minimum and maximum."""
    low, high = int(stored.min()), int(stored.max())
    levels = show(np.arange(low, high + 1, dtype=np.float64))
    # The index is the bit pattern, in which negative values come last: no offset and no copy.
    table = np.empty(2 ** (8 * stored.dtype.itemsize), levels.dtype)
    negative = max(0, min(0, high + 1) - low)
    if negative:
        table[low : low + negative or None] = levels[:negative]
    table[max(low, 0) : high + 1 if high >= 0 else 0] = levels[negative:]
    return cast(Pixels, np.take(table, stored.view(f"u{stored.dtype.itemsize}")))


def _by_rows(stored: Stored, show: Callable[[Floats], Pixels]) -> Pixels:
    """Return ``show(stored)`` for wide values, a few rows at a time to save memory."""
    step = max(1, (1 << 16) // stored.shape[1])
    parts = []
    for start in range(0, stored.shape[0], step):
        rows = stored[start : start + step].astype(np.float64)
        parts.append(show(np.nan_to_num(rows, copy=False)))
    return cast(Pixels, np.concatenate(parts))


# --- size -------------------------------------------------------------------------------------


def _fit(shown: Stored, rendering: Rendering, aspect: float) -> tuple[Any, tuple[int, ...]]:
    """Return ``shown`` at the rendering's size, and its content's (rows, columns, top, left)."""
    size = rendering.size
    if not rendering.keep_aspect:
        return resize(shown, size, size), (size, size, 0, 0)
    height, width = shown.shape[0] * aspect, shown.shape[1]
    longest = max(height, width)
    rows = max(1, round(size * height / longest))
    columns = max(1, round(size * width / longest))
    top, left = (size - rows) // 2, (size - columns) // 2
    canvas = np.zeros((size, size, *shown.shape[2:]), shown.dtype)
    canvas[top : top + rows, left : left + columns] = resize(shown, rows, columns)
    return canvas, (rows, columns, top, left)


def resize(shown: Stored, rows: int, columns: int) -> Stored:
    """Return ``shown`` (uint8, uint16 or float32) resampled with an antialiasing triangle filter.

    Large reductions average whole blocks first (Pillow's reducing gap of 2). This changes a pixel
    by at most 2/255 of the range and takes a quarter of the time.
    """
    if shown.shape[:2] == (rows, columns):
        return np.ascontiguousarray(shown)
    if shown.dtype != np.uint8 and shown.ndim == 3:
        return np.stack([resize(plane, rows, columns) for plane in np.moveaxis(shown, 2, 0)], 2)
    wide = shown.dtype == np.uint16
    image = Image.fromarray(shown.astype(np.float32) if wide else np.ascontiguousarray(shown))
    small = image.resize((columns, rows), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if wide:
        return np.asarray(np.rint(np.clip(np.asarray(small), 0, 65535)).astype(np.uint16))
    return np.array(small)
