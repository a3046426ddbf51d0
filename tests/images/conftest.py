"""Fixtures that make DICOM files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset, FileMetaDataset

MakeDicom = Callable[..., bytes]


@pytest.fixture(scope="session")
def dicom() -> MakeDicom:
    """Return a function that makes an explicit little-endian file of an array, as bytes."""
    return _make


def _make(
    stored: npt.NDArray[Any],
    *,
    syntax: str = uid.ExplicitVRLittleEndian,
    pixel_data: bytes | None = None,
    frames: int | None = None,
    prepare: Callable[[Dataset], None] | None = None,
    **elements: Any,
) -> bytes:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.UID(syntax)
    data.SOPClassUID = uid.SecondaryCaptureImageStorage
    data.SOPInstanceUID = "1.2.3.4"
    colour = stored.ndim == 3 and stored.shape[-1] == 3
    data.Rows, data.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    if frames is not None:
        data.NumberOfFrames = frames
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * stored.dtype.itemsize
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.HighBit = data.BitsStored - 1
    if prepare:
        prepare(data)
    data.PixelData = stored.tobytes() if pixel_data is None else pixel_data
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"
    if uid.UID(syntax).is_encapsulated:
        data["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


@pytest.fixture
def ramp() -> npt.NDArray[np.uint16]:
    """A 64 x 64 image with every value from 0 to 4095 once."""
    return np.arange(4096, dtype=np.uint16).reshape(64, 64)
