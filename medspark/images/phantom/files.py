"""Encode a synthetic radiograph: DICOM in many syntaxes, full of fake identifiers, or PNG."""

from __future__ import annotations

import io
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.sequence import Sequence

from medspark.images.phantom.plan import CANARY, SYNTAXES, PhantomConfig, Study, generator
from medspark.images.phantom.radiograph import radiograph
from medspark.seeding import derive


def encode(study: Study, config: PhantomConfig) -> bytes:
    """Return the file of ``study``: DICOM (PS3.10), or PNG."""
    values = stored_values(study, config)
    if study.syntax == "png":
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG", compress_level=1)
        return file.getvalue()
    return to_bytes(header(study, config), values, study)


def stored_values(study: Study, config: PhantomConfig) -> npt.NDArray[Any]:
    """Return the stored values of ``study``: uint8, uint16 or int16 of shape (size, size)."""
    top = 2**study.bits - 1
    image = radiograph(study, config)
    levels = np.rint((1 - image if study.inverted else image) * top).astype(np.uint16)
    if study.bits == 8:
        return np.asarray(levels.astype(np.uint8))
    if study.syntax == "png":  # PNG has no 12-bit format, so use all 16 bits
        return np.asarray(np.rint(image * 65535).astype(np.uint16))
    return (
        np.asarray((levels.astype(np.int32) - 32768).astype(np.int16)) if study.signed else levels
    )


def to_bytes(data: Dataset, values: npt.NDArray[Any], study: Study) -> bytes:
    """Return ``data`` with the pixels ``values`` as a file in the syntax of ``study``."""
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        data.PixelData = encapsulate([_compressed(values, study)])
        data["PixelData"].VR = "OB"
    else:
        swapped = study.syntax == "big_endian"
        data.PixelData = (values.byteswap() if swapped else values).tobytes()
        data["PixelData"].VR = "OB" if study.bits == 8 else "OW"
    file = io.BytesIO()
    dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def _compressed(values: npt.NDArray[Any], study: Study) -> bytes:
    if study.syntax == "rle":
        return _rle(values)
    encoded: bytes = get_encoder(str(SYNTAXES[study.syntax])).encode(
        np.ascontiguousarray(values).tobytes(),
        encoding_plugin={"jpeg_ls": "pyjpegls", "jpeg_2000": "pylibjpeg"}[study.syntax],
        rows=values.shape[0],
        columns=values.shape[1],
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=8 * values.dtype.itemsize,
        bits_stored=study.bits,
        pixel_representation=int(study.signed),
        photometric_interpretation="MONOCHROME1" if study.inverted else "MONOCHROME2",
    )
    return encoded


def _rle(values: npt.NDArray[Any]) -> bytes:
    """Return an RLE frame (PS3.5 Annex G) of literal runs only: noise hardly repeats values."""
    planes = values.astype(values.dtype.newbyteorder(">"))[..., None].view(np.uint8)
    segments = []
    for plane in np.moveaxis(planes, 2, 0):
        runs = []
        for start in range(0, plane.shape[1], 128):
            run = plane[:, start : start + 128]
            runs += [np.full((len(run), 1), run.shape[1] - 1, np.uint8), run]
        data = np.concatenate(runs, axis=1).tobytes()
        segments.append(data + b"\0" * (len(data) % 2))
    offsets = 64 + np.cumsum([0, *map(len, segments[:-1])])
    head = np.zeros(16, "<u4")
    head[: len(segments) + 1] = len(segments), *offsets
    return head.tobytes() + b"".join(segments)


def header(study: Study, config: PhantomConfig) -> Dataset:
    """Return the header of ``study``, with fake identifiers in every kind of element."""
    data = Dataset()
    data.file_meta = _meta(study, config)
    _add_image_module(data, study, config)
    _add_identifiers(data, study, config)
    return data


def _meta(study: Study, config: PhantomConfig) -> FileMetaDataset:
    meta: Any = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid(config, "instance", study.number)
    meta.TransferSyntaxUID = SYNTAXES[study.syntax]
    meta.ImplementationClassUID = "2.25.302043790172249692526321623266752743501"
    return cast(FileMetaDataset, meta)


def _uid(config: PhantomConfig, *names: str | int) -> str:
    return f"2.25.{derive(config.seed, 'uid', *names)}"


def _add_image_module(data: Dataset, study: Study, config: PhantomConfig) -> None:
    """Add the attributes that an image needs (PS3.3 C.7.6.3, C.11)."""
    data.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    data.Modality = "DX"
    data.BodyPartExamined = "CHEST"
    data.ViewPosition = ("PA", "AP")[study.number % 2]
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    data.Rows = data.Columns = config.size
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if study.inverted else "MONOCHROME2"
    data.BitsAllocated = 8 if study.bits == 8 else 16
    data.BitsStored, data.HighBit = study.bits, study.bits - 1
    data.PixelRepresentation = int(study.signed)
    data.ImagerPixelSpacing = [f"{400 / config.size:.4f}"] * 2
    data.BurnedInAnnotation = "NO"
    data.RescaleSlope, data.RescaleIntercept = "1", "32768" if study.signed else "0"
    if study.bits > 8:
        # All depths have the same window: black at zero, white at the highest value.
        data.WindowCenter, data.WindowWidth = str(2 ** (study.bits - 1)), str(2**study.bits)


def _add_identifiers(data: Dataset, study: Study, config: PhantomConfig) -> None:
    """Add a fake person to many elements, as in a real archive."""
    patient = study.patient
    rng = generator(config.seed, "person", patient.number)
    data.PatientName = f"{CANARY}^{'AB'[patient.label]}{patient.number}"
    data.PatientID = patient.identifier
    data.PatientBirthDate = f"{int(rng.integers(1925, 2005))}0{int(rng.integers(1, 10))}15"
    data.PatientSex = "FM"[int(rng.integers(2))]
    data.StudyDate = f"2024{study.number % 12 + 1:02d}{study.number % 28 + 1:02d}"
    data.StudyInstanceUID = _uid(config, "study", study.number)
    data.SeriesInstanceUID = _uid(config, "series", study.number)
    data.AccessionNumber = f"{CANARY}{study.number}"
    data.InstitutionName = f"{CANARY} Hospital {patient.site}"
    data.ReferringPhysicianName = f"{CANARY}^Doctor"
    data.StudyDescription = f"Chest of {CANARY}"
    data.PatientComments = f"{CANARY} lives at 1 Example Street"
    data.Manufacturer = ("SIEMENS", "Philips Medical Systems", "Acme")[study.number % 3]
    request = Dataset()
    request.RequestedProcedureDescription = f"{CANARY} nested"
    request.RequestingPhysician = f"{CANARY}^Nested"
    data.RequestAttributesSequence = Sequence([request])
    block = data.private_block(0x0009, f"{CANARY} PRIVATE", create=True)
    block.add_new(0x01, "LO", f"{CANARY} private {patient.number}")
