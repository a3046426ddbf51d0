"""Labelled synthetic chest radiographs as a real archive: many syntaxes, planted names, damage.

    python -m medspark.images.phantom FOLDER --count 2000 --size 96 --seed 0

Everything follows from the seed and the image's number, so any part of an archive can be made
anywhere. The two classes differ by a faint opacity in one lung, amid anatomy, texture and noise
that vary more than it does: a small network reaches a test AUROC of about .95, never 1.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.sequence import Sequence as DicomSequence

from medspark.config import Config
from medspark.images.reasons import Reason
from medspark.seeding import derive

_LOGGER = logging.getLogger(__name__)

CLASSES = ("normal", "pneumonia")
# In every planted identifier; nothing that leaves ingest may contain it.
CANARY = "CANARY"

Image2D = npt.NDArray[np.float32]

SYNTAXES: dict[str, uid.UID | None] = {
    "explicit": uid.ExplicitVRLittleEndian,
    "implicit": uid.ImplicitVRLittleEndian,
    "big_endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg_ls": uid.JPEGLSLossless,
    "jpeg_2000": uid.JPEG2000Lossless,
    "png": None,
}
_SITES = ("a", "b", "c")
_ANATOMY_GRID = 128  # anatomy is smooth: larger images are enlarged from this grid, in pixels


class PhantomConfig(Config):
    """A synthetic archive."""

    count: int = Field(2000, ge=1, description="distinct images")
    size: int = Field(96, ge=32, le=4096, description="height and width, in pixels")
    seed: int = Field(0, description="everything follows from it")
    contrast: float = Field(
        0.6, ge=0, le=1, description="strongest opacity, as a part of the grey range"
    )
    prevalence: float = Field(0.5, ge=0, le=1, description="part of the patients with pneumonia")
    syntaxes: tuple[str, ...] = Field(
        tuple(SYNTAXES), description="kinds of file to write, from SYNTAXES, by turns"
    )
    bits: tuple[int, ...] = Field((8, 12, 16), description="bits stored, from 8, 12, 16, by turns")
    extras: bool = Field(
        True, description="add damaged, unlabelled and duplicate files (about one in 40)"
    )
    processes: int = Field(1, ge=1, description="processes that write")


@dataclass(frozen=True, slots=True)
class ArchiveSummary:
    """What ``write_archive`` wrote: the answer key for an ingest."""

    folder: str
    labels: str
    files: int
    images: int  # distinct, whole and labelled: the samples that an ingest should find
    duplicates: int
    patients: int
    class_counts: dict[str, int] = field(default_factory=dict)
    quarantine_reasons: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Patient:
    """Who is imaged. ``identifier`` is fake, and planted to be found if it leaks."""

    number: int
    label: int
    site: str

    @property
    def identifier(self) -> str:
        """The PatientID of headers and of labels.csv."""
        return f"{CANARY}-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Study:
    """One image to make: who, which of the patient's, and how it is stored."""

    number: int  # of the image in the archive
    patient: Patient
    syntax: str
    bits: int
    inverted: bool
    signed: bool

    @property
    def path(self) -> str:
        """Path below the archive's folder. It does not tell the class or the patient."""
        suffix = ".png" if self.syntax == "png" else "" if self.number % 7 == 3 else ".dcm"
        return f"site-{self.patient.site}/{self.number // 500:03d}/{self.number:06d}{suffix}"


# --- the archive ------------------------------------------------------------------------------


def write_archive(folder: str | Path, config: PhantomConfig | None = None) -> ArchiveSummary:
    """Write images and ``labels.csv`` (path, label, patient_id, site) below ``folder``.

    Returns what is in it. Files that are there already are overwritten.
    """
    config = config or PhantomConfig()
    folder = Path(folder)
    studies = list(plan(config))
    for parent in {(folder / study.path).parent for study in studies}:
        parent.mkdir(parents=True, exist_ok=True)
    size = _write_all(folder, studies, config)
    rows = [_row(study.path, study) for study in studies]
    counts = {name: sum(CLASSES[s.patient.label] == name for s in studies) for name in CLASSES}
    reasons: dict[str, int] = {}
    duplicates = 0
    if config.extras:
        duplicates = _write_duplicates(folder, studies, config, rows)
        reasons = _write_damaged(folder, studies, config, rows)
    labels = folder / "labels.csv"
    with labels.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "patient_id", "site"])
        writer.writeheader()
        writer.writerows(rows)
    return ArchiveSummary(
        folder=str(folder),
        labels=str(labels),
        files=len(studies) + duplicates + sum(reasons.values()),
        images=len(studies),
        duplicates=duplicates,
        patients=len({study.patient.number for study in studies}),
        class_counts=counts,
        quarantine_reasons=reasons,
        bytes=size,
    )


def plan(config: PhantomConfig) -> Iterator[Study]:
    """Yield every image of the archive: patients have one to four, all of one class and site."""
    number = patient_number = 0
    while number < config.count:
        rng = _generator(config.seed, "patient", patient_number)
        label = int(rng.random() < config.prevalence)
        patient = Patient(patient_number, label, _SITES[int(rng.integers(len(_SITES)))])
        for _ in range(min(int(rng.integers(1, 5)), config.count - number)):
            yield _study(config, number, patient)
            number += 1
        patient_number += 1


def _study(config: PhantomConfig, number: int, patient: Patient) -> Study:
    # By hash rather than by turns: no syntax, depth or polarity goes along with a class.
    rng = _generator(config.seed, "format", number)
    syntax = config.syntaxes[int(rng.integers(len(config.syntaxes)))]
    bits = config.bits[int(rng.integers(len(config.bits)))]
    inverted = syntax != "png" and rng.random() < 0.25
    signed = bits == 16 and syntax in ("explicit", "implicit", "jpeg_2000") and rng.random() < 0.25
    return Study(number, patient, syntax, bits, bool(inverted), bool(signed))


def _generator(seed: int, *names: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(derive(seed, "phantom", *names)))


def _row(path: str, study: Study) -> dict[str, str]:
    return {
        "path": path,
        "label": CLASSES[study.patient.label],
        "patient_id": study.patient.identifier,
        "site": study.patient.site,
    }


def _write_all(folder: Path, studies: list[Study], config: PhantomConfig) -> int:
    write = functools.partial(_write_study, folder, config)
    if config.processes == 1:
        return sum(map(write, studies))
    with ProcessPoolExecutor(config.processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(write, studies, chunksize=64))


def _write_study(folder: Path, config: PhantomConfig, study: Study) -> int:
    return (folder / study.path).write_bytes(encode(study, config))


def _write_duplicates(
    folder: Path, studies: list[Study], config: PhantomConfig, rows: list[dict[str, str]]
) -> int:
    """Write copies of some images: one in two byte by byte, the others in another syntax."""
    chosen = studies[:: max(1, min(100, len(studies)))]
    (folder / "again").mkdir(exist_ok=True)
    for order, study in enumerate(chosen):
        path = f"again/{study.number:06d}.dcm"
        data = (folder / study.path).read_bytes()
        if order % 2 and study.syntax != "png":
            other = "explicit" if study.syntax != "explicit" else "rle"
            data = encode(Study(study.number, study.patient, other, study.bits, study.inverted,
                                study.signed), config)  # fmt: skip
        (folder / path).write_bytes(data)
        rows.append(_row(path, study))
    return len(chosen)


def _write_damaged(
    folder: Path, studies: list[Study], config: PhantomConfig, rows: list[dict[str, str]]
) -> dict[str, int]:
    """Write files that no ingest can use, and return how many for each reason."""
    (folder / "damaged").mkdir(exist_ok=True)
    reasons: dict[str, int] = {}
    for copy in range(max(1, len(studies) // 400)):
        study = Study(len(studies) + copy, studies[0].patient, "explicit", 12, False, False)
        for reason, data in _damaged(study, config):
            path = f"damaged/{reason.value}-{copy:03d}.dcm"
            (folder / path).write_bytes(data)
            reasons[reason.value] = reasons.get(reason.value, 0) + 1
            if reason is not Reason.NO_LABEL:
                rows.append(_row(path, study))
    return reasons


def _damaged(study: Study, config: PhantomConfig) -> Iterator[tuple[Reason, bytes]]:
    whole = encode(study, config)
    yield Reason.EMPTY_FILE, b""
    yield Reason.NOT_AN_IMAGE, b"<!DOCTYPE html><title>504 Gateway Time-out</title>" + b" " * 200
    yield Reason.TRUNCATED, whole[: len(whole) * 3 // 5]
    yield Reason.NO_LABEL, whole
    flagged = header(study, config)
    flagged.BurnedInAnnotation = "YES"
    yield Reason.BURNED_IN_ANNOTATION, to_bytes(flagged, stored_values(study, config), study)
    hollow = header(study, config)
    pixels = stored_values(study, config)
    data = to_bytes(hollow, pixels, study)
    rows_element = b"\x28\x00\x10\x00US\x02\x00"
    at = data.index(rows_element) + len(rows_element)
    yield Reason.INCONSISTENT_HEADER, data[:at] + b"\0\0" + data[at + 2 :]


# --- the image --------------------------------------------------------------------------------


def radiograph(study: Study, config: PhantomConfig) -> Image2D:
    """Return the image of ``study``: float32 (size, size), black 0 to white 1."""
    patient = study.patient
    body = _generator(config.seed, "anatomy", patient.number)
    rng = _generator(config.seed, "image", study.number)
    grid = min(config.size, _ANATOMY_GRID)
    # Breath and position differ between the images of a patient, the build does not.
    y, x = _coordinates(grid, rng)
    image, lungs = _anatomy(x, y, body)
    image += _texture(grid, rng, cells=6) * 0.035 + _texture(grid, rng, cells=14) * 0.02
    if patient.label:
        image += _opacity(x, y, rng) * lungs * np.float32(config.contrast)
    if grid < config.size:
        image = _enlarged(image, config.size)
    image = _at_site(image, patient.site)
    # Quantum noise grows with the root of what passes, and is finer than the anatomy.
    dose = np.float32(0.02 * (config.size / 64) ** 0.5)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * dose * np.sqrt(np.clip(1.1 - image, 0.1, 1))
    return np.clip(image, 0, 1)


def _coordinates(grid: int, rng: np.random.Generator) -> tuple[Image2D, Image2D]:
    line = np.linspace(-1, 1, grid, dtype=np.float32)
    shift = rng.normal(0, 0.03, 2).astype(np.float32)
    zoom = np.float32(rng.normal(1, 0.03))
    tilt = np.float32(rng.normal(0, 0.03))
    x, y = (line * zoom + shift[0])[None, :], (line * zoom + shift[1])[:, None]
    return y + tilt * x, x - tilt * y


def _ellipse(
    x: Image2D, y: Image2D, centre: tuple[float, float], radii: tuple[float, float], soft: float
) -> Image2D:
    """Return 1 inside the ellipse and 0 outside, with an edge ``soft`` wide."""
    distance = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return np.asarray(np.clip((1 - distance) / soft + 0.5, 0, 1), np.float32)


def _anatomy(x: Image2D, y: Image2D, body: np.random.Generator) -> tuple[Image2D, Image2D]:
    """Return the healthy image and the mask of the lungs, of one patient's build."""

    def vary(mean: float, spread: float) -> float:
        return float(body.normal(mean, spread))

    width, height, base = vary(0.29, 0.02), vary(0.56, 0.03), vary(0.52, 0.03)
    right = _ellipse(x, y, (vary(-0.40, 0.02), -0.08), (width, height), 0.25)
    left = _ellipse(x, y, (vary(0.40, 0.02), -0.08), (width * 0.92, height), 0.25)
    # The diaphragm cuts the lungs off from below.
    dome = np.clip((base - 0.25 * (np.abs(x) - 0.4) ** 2 - y) / 0.08, 0, 1)
    lungs = np.maximum(right, left) * dome
    trunk = _ellipse(x, y, (0, 0.15), (vary(0.92, 0.03), 1.35), 0.2)
    heart = _ellipse(x, y, (vary(0.12, 0.03), vary(0.28, 0.03)), (vary(0.30, 0.03), 0.28), 0.35)
    spine = np.exp(-((x / 0.13) ** 2))
    hila = np.exp(-(((np.abs(x) - 0.2) / 0.1) ** 2) - ((y - 0.02) / 0.16) ** 2)
    ribs = np.cos((y + 0.35 * x * x) * vary(24, 1) + vary(0, 1)) ** 4
    image = 0.62 * trunk - vary(0.36, 0.03) * lungs + vary(0.16, 0.03) * heart
    image += 0.13 * spine * trunk + vary(0.08, 0.03) * hila + vary(0.05, 0.012) * ribs * trunk
    return np.asarray(image, np.float32), np.asarray(lungs * (1 - 0.6 * heart), np.float32)


def _texture(grid: int, rng: np.random.Generator, *, cells: int) -> Image2D:
    """Return smooth noise of about unit spread, ``cells`` blotches across."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return _enlarged(coarse, grid)


def _enlarged(image: Image2D, size: int) -> Image2D:
    large = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(large, np.float32)


def _opacity(x: Image2D, y: Image2D, rng: np.random.Generator) -> Image2D:
    """Return a consolidation or ground glass in one lung, at most about 1 high."""
    side = rng.choice((-0.4, 0.4))
    centre = side + rng.normal(0, 0.07), rng.uniform(-0.35, 0.35)
    # From invisible to plain: the invisible ones keep the best possible AUROC below 1, the plain
    # ones let a network learn within minutes.
    strength = rng.uniform(0.15, 1.0)
    if rng.random() < 0.5:  # consolidation: one compact blot
        return np.asarray(strength * _blot(x, y, centre, rng.uniform(0.12, 0.18)), np.float32)
    spread = rng.uniform(0.20, 0.30)  # ground glass: wide, patchy, fainter
    grain = 0.75 + 0.25 * _texture(len(y), rng, cells=20)
    return np.asarray(0.8 * strength * grain * _blot(x, y, centre, spread), np.float32)


def _blot(x: Image2D, y: Image2D, centre: tuple[float, float], spread: float) -> Image2D:
    square = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * spread**2)
    return np.asarray(np.exp(-square), np.float32)


def _at_site(image: Image2D, site: str) -> Image2D:
    """Return the image as that site's detector and processing would show it."""
    gain, offset, gamma = {"a": (1.0, 0.0, 1.0), "b": (0.9, 0.07, 1.0), "c": (1.0, 0.0, 0.85)}[site]
    shown = np.clip(image, 0.001, 1) ** np.float32(gamma)
    return np.asarray(shown * np.float32(gain) + np.float32(offset), np.float32)


# --- the file ---------------------------------------------------------------------------------


def encode(study: Study, config: PhantomConfig) -> bytes:
    """Return the file of ``study``: DICOM (PS3.10), or PNG."""
    values = stored_values(study, config)
    if study.syntax == "png":
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG", compress_level=1)
        return file.getvalue()
    return to_bytes(header(study, config), values, study)


def stored_values(study: Study, config: PhantomConfig) -> npt.NDArray[Any]:
    """Return the image of ``study`` as stored: uint8, uint16 or int16 of shape (size, size)."""
    top = 2**study.bits - 1
    image = radiograph(study, config)
    levels = np.rint((1 - image if study.inverted else image) * top).astype(np.uint16)
    if study.bits == 8:
        return np.asarray(levels.astype(np.uint8))
    if study.syntax == "png":  # a 12-bit PNG does not exist: fill the 16 bits
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
    """Return an RLE frame (PS3.5 Annex G) of literal runs: noise has no others, and it is quick."""
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
    """Return the header of ``study``, with fake identifiers in every kind of place."""
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
    """Add what an image needs (PS3.3 C.7.6.3, C.11)."""
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
        # All depths are shown alike: black at zero, white at the highest value.
        data.WindowCenter, data.WindowWidth = str(2 ** (study.bits - 1)), str(2**study.bits)


def _add_identifiers(data: Dataset, study: Study, config: PhantomConfig) -> None:
    """Add a fake person, who is all over the place as in a real archive."""
    patient = study.patient
    rng = _generator(config.seed, "person", patient.number)
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
    data.RequestAttributesSequence = DicomSequence([request])
    block = data.private_block(0x0009, f"{CANARY} PRIVATE", create=True)
    block.add_new(0x01, "LO", f"{CANARY} private {patient.number}")


# --- command line -----------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Write an archive and print its summary as JSON."""
    defaults = PhantomConfig()
    parser = argparse.ArgumentParser(
        prog="python -m medspark.images.phantom",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write, made if missing")
    for name, about in PhantomConfig.model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, bool):
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=default,
                help=about.description)  # fmt: skip
        elif isinstance(default, tuple):
            parser.add_argument(f"--{name}", nargs="+", type=type(default[0]), default=default,
                                choices=default, help=about.description)  # fmt: skip
        else:
            parser.add_argument(
                f"--{name}", type=type(default), default=default, help=about.description
            )
    arguments = vars(parser.parse_args(argv))
    folder = arguments.pop("folder")
    summary = write_archive(folder, PhantomConfig(**arguments))
    sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
