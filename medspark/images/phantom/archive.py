"""Write the synthetic archive: images, duplicates, damaged files, and the label table."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from medspark.images.phantom.files import encode, header, stored_values, to_bytes
from medspark.images.phantom.plan import CLASSES, PhantomConfig, Study, plan
from medspark.images.reasons import Reason


@dataclass(frozen=True, slots=True)
class ArchiveSummary:
    """The content of a written archive, and so the expected result of its ingest."""

    folder: str
    labels: str
    files: int
    images: int  # distinct, undamaged and labelled: the samples that an ingest should find
    duplicates: int
    patients: int
    class_counts: dict[str, int] = field(default_factory=dict)
    quarantine_reasons: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


def write_archive(folder: str | Path, config: PhantomConfig | None = None) -> ArchiveSummary:
    """Write images and ``labels.csv`` (path, label, patient_id, site) below ``folder``.

    Returns a summary of the archive. Existing files are overwritten.
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
    """Write copies of some images: every other one byte by byte, the rest in another syntax."""
    chosen = studies[:: max(1, min(100, len(studies)))]
    (folder / "again").mkdir(exist_ok=True)
    for order, study in enumerate(chosen):
        path = f"again/{study.number:06d}.dcm"
        data = (folder / study.path).read_bytes()
        if order % 2 and study.syntax != "png":
            other = "explicit" if study.syntax != "explicit" else "rle"
            data = encode(replace(study, syntax=other), config)
        (folder / path).write_bytes(data)
        rows.append(_row(path, study))
    return len(chosen)


def _write_damaged(
    folder: Path, studies: list[Study], config: PhantomConfig, rows: list[dict[str, str]]
) -> dict[str, int]:
    """Write files that an ingest must quarantine, and return their number by reason."""
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
