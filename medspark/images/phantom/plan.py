"""Plan a synthetic archive: its patients, their images, and the format of each file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field
from pydicom import uid

from medspark.config import Config
from medspark.seeding import derive

CLASSES = ("normal", "pneumonia")
# Every planted identifier contains it; no output of ingest may contain it.
CANARY = "CANARY"

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


class PhantomConfig(Config):
    """Configuration of a synthetic archive."""

    count: int = Field(2000, ge=1, description="distinct images")
    size: int = Field(96, ge=32, le=4096, description="height and width, in pixels")
    seed: int = Field(0, description="seed of all random choices")
    contrast: float = Field(
        0.6, ge=0, le=1, description="strongest opacity, as a share of the grey range"
    )
    prevalence: float = Field(0.5, ge=0, le=1, description="share of patients with pneumonia")
    syntaxes: tuple[str, ...] = Field(
        tuple(SYNTAXES), description="kinds of file to write, from SYNTAXES, chosen at random"
    )
    bits: tuple[int, ...] = Field(
        (8, 12, 16), description="bits stored, from 8, 12, 16, chosen at random"
    )
    style: Literal["usual", "portable"] = Field(
        "usual",
        description="portable: as of a bedside unit, collimated askew, flat, with a bright marker; "
        "a rare kind of image, of which the usual archive has none",
    )
    extras: bool = Field(
        True, description="add damaged, unlabelled and duplicate files (about one in 40)"
    )
    processes: int = Field(1, ge=1, description="number of writing processes")


@dataclass(frozen=True, slots=True)
class Patient:
    """A fake patient. ``identifier`` contains CANARY, so that tests find it if it leaks."""

    number: int
    label: int
    site: str

    @property
    def identifier(self) -> str:
        """The PatientID in headers and in labels.csv."""
        return f"{CANARY}-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Study:
    """One image to generate: its number, patient and storage format."""

    number: int  # index of the image in the archive
    patient: Patient
    syntax: str
    bits: int
    inverted: bool
    signed: bool

    @property
    def path(self) -> str:
        """Path below the archive's folder. It does not reveal the class or the patient."""
        suffix = ".png" if self.syntax == "png" else "" if self.number % 7 == 3 else ".dcm"
        return f"site-{self.patient.site}/{self.number // 500:03d}/{self.number:06d}{suffix}"


def plan(config: PhantomConfig) -> Iterator[Study]:
    """Yield all images of the archive. A patient has one to four, all of one class and site."""
    number = patient_number = 0
    while number < config.count:
        rng = generator(config.seed, "patient", patient_number)
        label = int(rng.random() < config.prevalence)
        patient = Patient(patient_number, label, _SITES[int(rng.integers(len(_SITES)))])
        for _ in range(min(int(rng.integers(1, 5)), config.count - number)):
            yield _study(config, number, patient)
            number += 1
        patient_number += 1


def _study(config: PhantomConfig, number: int, patient: Patient) -> Study:
    # Chosen by hash, so that syntax, depth and polarity do not correlate with the class.
    rng = generator(config.seed, "format", number)
    syntax = config.syntaxes[int(rng.integers(len(config.syntaxes)))]
    bits = config.bits[int(rng.integers(len(config.bits)))]
    inverted = syntax != "png" and rng.random() < 0.25
    signed = bits == 16 and syntax in ("explicit", "implicit", "jpeg_2000") and rng.random() < 0.25
    return Study(number, patient, syntax, bits, bool(inverted), bool(signed))


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return the random generator of the purpose that ``names`` describe."""
    return np.random.Generator(np.random.SFC64(derive(seed, "phantom", *names)))
