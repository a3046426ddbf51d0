"""Write archives of hundreds of thousands of DICOM files in minutes.

pydicom encodes a few dozen phantom radiographs, once. Every file is one of these with its own UIDs,
patient and pixels: bytes of the same length in the same places, so that it stays valid DICOM
(PS3.10). Files lie a thousand to a folder below the folder of their class, which is their label.
"""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from medspark.images.phantom import (
    CLASSES,
    PhantomConfig,
    Study,
    header,
    plan,
    stored_values,
    to_bytes,
)

SIDE = 64
PER_FOLDER = 1000
TEMPLATES = 16
# Brightest change of a pixel: no two files show the same image.
NOISE = 4
_DIGITS = 12
_UID = "2.25.1" + "0" * 25


@dataclass(frozen=True)
class Template:
    """A DICOM file whose identifiers end in a number of 12 digits, and where these are."""

    content: bytes
    image_numbers: tuple[int, ...]  # of the study, series and instance UIDs
    patient_numbers: tuple[int, ...]  # of the PatientID and the name
    pixels: int

    def file(self, number: int, patient: int) -> bytes:
        """Return the file of image ``number`` of ``patient``."""
        content = bytearray(self.content)
        for places, value in ((self.image_numbers, number), (self.patient_numbers, patient)):
            digits = b"%0*d" % (_DIGITS, value)
            for place in places:
                content[place : place + _DIGITS] = digits
        noise = np.random.Generator(np.random.SFC64(number)).integers(
            0, NOISE, SIDE * SIDE, dtype=np.uint8
        )
        pixels = np.frombuffer(content, np.uint8, SIDE * SIDE, self.pixels)
        pixels += noise
        return bytes(content)


@functools.cache
def templates() -> tuple[tuple[Template, ...], ...]:
    """Return the templates of each class."""
    config = PhantomConfig(
        count=8 * TEMPLATES, size=SIDE, syntaxes=("explicit",), bits=(8,), extras=False
    )
    studies = list(plan(config))
    by_class = [[s for s in studies if s.patient.label == label] for label in range(len(CLASSES))]
    return tuple(
        tuple(_template(study, config) for study in chosen[:TEMPLATES]) for chosen in by_class
    )


def _template(study: Study, config: PhantomConfig) -> Template:
    data = header(study, config)
    numbered = "0" * _DIGITS
    kinds = {"StudyInstanceUID": "7", "SeriesInstanceUID": "8", "SOPInstanceUID": "9"}
    for name, kind in kinds.items():
        setattr(data, name, f"{_UID[: -_DIGITS - 1]}{kind}{numbered}")
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PatientID = f"P-{numbered}"
    data.PatientName = f"N^{numbered}"
    # Room for the noise: the sum stays below 256.
    values = np.minimum(stored_values(study, config), 255 - NOISE)
    content = to_bytes(data, values, study)
    uids = [str(getattr(data, name)) for name in kinds]
    return Template(
        content,
        tuple(place + len(uid) - _DIGITS for uid in uids for place in _places(content, uid)),
        tuple(_places(content, numbered, after=b"P-") + _places(content, numbered, after=b"N^")),
        len(content) - SIDE * SIDE,
    )


def _places(content: bytes, text: str, *, after: bytes = b"") -> list[int]:
    wanted, found, start = after + text.encode(), [], 0
    while (place := content.find(wanted, start)) >= 0:
        found.append(place + len(after))
        start = place + 1
    return found


def path_of(number: int) -> str:
    """Return the path of image ``number``, relative to the archive. Two images are a patient's."""
    label = (number // 2) % len(CLASSES)
    return f"{CLASSES[label]}/{number // PER_FOLDER:05d}/{number:09d}.dcm"


def write(folder: Path, start: int, stop: int, *, processes: int) -> int:
    """Write the images from ``start`` to ``stop`` below ``folder``; return their bytes.

    Files that are there are written again, with the same bytes.
    """
    blocks = [
        (first, min(first + PER_FOLDER, stop))
        for first in range(start - start % PER_FOLDER, stop, PER_FOLDER)
    ]
    blocks = [(max(first, start), last) for first, last in blocks]
    if processes == 1 or len(blocks) == 1:
        return sum(_block(folder, block) for block in blocks)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(functools.partial(_block, folder), blocks, chunksize=4))


def _block(folder: Path, block: tuple[int, int]) -> int:
    made = templates()
    for parent in {(folder / path_of(number)).parent for number in range(*block)}:
        parent.mkdir(parents=True, exist_ok=True)
    size = 0
    for number in range(*block):
        patient = number // 2
        chosen = made[patient % len(CLASSES)]
        content = chosen[number // 4 % len(chosen)].file(number, patient)
        with open(f"{folder}/{path_of(number)}", "wb") as file:
            size += file.write(content)
    return size
