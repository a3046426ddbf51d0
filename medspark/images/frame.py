"""The result of decoding a file: one de-identified, rendered image per frame."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Attributes:
    """The header values that are stored; all others are dropped.

    Keys are keyed pseudonyms (None without a key or without an identifier). Text fields only hold
    values that ``medspark.images.deidentify`` lists, never copies of header text.
    """

    file_format: str  # dicom, png, jpeg, tiff, bmp or npz
    rows: int  # of the stored image, in pixels
    columns: int
    frames: int = 1
    samples_per_pixel: int = 1
    bits_stored: int = 8
    signed: bool = False
    photometric: str = "MONOCHROME2"
    transfer_syntax: str | None = None  # UID of PS3.6 table A-1
    sop_class: str | None = None  # UID of PS3.6 table A-1
    modality: str | None = None
    body_part: str | None = None
    view_position: str | None = None
    laterality: str | None = None
    manufacturer: str | None = None
    sex: str | None = None  # F, M or O
    age_years: int | None = None  # 90 stands for 90 and above
    relative_day: int | None = None  # study day, shifted by a secret offset per patient
    row_spacing_mm: float | None = None
    column_spacing_mm: float | None = None
    spacing_source: str | None = None  # the DICOM attribute that gave the spacing
    burned_in: str | None = None  # YES, NO, or None if the file does not say
    patient_key: str | None = None
    study_key: str | None = None
    series_key: str | None = None
    instance_key: str | None = None
    decoder: str = ""  # the library that decoded the pixels, with its version


@dataclass(frozen=True, slots=True)
class Rendered:
    """How stored values became pixels, in enough detail to repeat it on the same file."""

    version: int
    window: str  # dicom_lut, dicom_window, percentile, full, or the name of a preset
    low: float | None  # modality value that becomes black; None if a table was applied
    high: float | None  # modality value that becomes white
    function: str  # LINEAR, LINEAR_EXACT, SIGMOID or LUT (PS3.3 C.11.2.1.2, C.11.2.1.1)
    inverted: bool  # MONOCHROME1 was turned to MONOCHROME2
    padded: bool  # PixelPaddingValue was blackened
    content_rows: int  # rows of the output that show the image; the rest is border
    content_columns: int
    top: int = 0  # border above the image, in pixels
    left: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image, ready to be stored.

    ``pixels`` is uint8 or uint16 of shape (rows, columns), or (rows, columns, 3) for colour.
    ``pixel_sha256`` hashes the stored values before rendering, with dtype and shape. So exact
    duplicates have equal hashes in every transfer syntax.
    """

    pixels: Pixels
    number: int  # from 1, as DICOM counts frames
    pixel_sha256: str
    attributes: Attributes
    rendered: Rendered


def sha256_of(stored: npt.NDArray[Any], photometric: str) -> str:
    """Return the SHA-256 of stored values, with their shape, type and photometric interpretation.

    It is equal in every transfer syntax. MONOCHROME1 and MONOCHROME2 differ, since equal values
    look different.
    """
    digest = hashlib.sha256(f"{photometric} {stored.dtype.str} {stored.shape}".encode())
    digest.update(np.ascontiguousarray(stored).data)
    return digest.hexdigest()
