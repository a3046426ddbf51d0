"""Derive labels from folders and coded DICOM attributes; join several findings into one label."""

from __future__ import annotations

from collections.abc import Iterable

from medspark import storage
from medspark.errors import UsageError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

# DICOM keywords that may be labels, and the fields that store their allow-listed values. Any other
# attribute may hold free text, which may contain a patient's name.
CODED_ATTRIBUTES = {
    "Modality": "modality",
    "BodyPartExamined": "body_part",
    "ViewPosition": "view_position",
    "ImageLaterality": "laterality",
    "Laterality": "laterality",
    "PatientSex": "sex",
    "Manufacturer": "manufacturer",
}

# Most characters in a class name: a diagnosis is shorter, free text is longer.
LONGEST_NAME = 128

# Separates the sorted findings in a sample's label. Without findings the label is empty.
BETWEEN_FINDINGS = "|"


def from_folders(path: str) -> tuple[str | None, str | None]:
    """Return the (label, split) given by the folders of ``path``, which is relative to the source.

    The label is the folder below ``train``, ``val`` or ``test`` if the path has one of these, else
    the first folder (as in torchvision's ImageFolder).
    """
    folders = path.split("/")[:-1]
    for depth, folder in enumerate(folders):
        split = SPLIT_NAMES.get(folder.lower())
        if split:
            below = folders[depth + 1 :]
            return (below[0] if below else None), split
    return (folders[0] if folders else None), None


def join_findings(names: Iterable[str], no_finding: str) -> str:
    """Return the label of an image with the findings ``names``, given in any order.

    Raises UsageError for a name that holds the separator or is too long.
    """
    findings = {name.strip() for name in names} - {"", no_finding}
    check_length(max(map(len, findings), default=0))
    for name in findings:
        if BETWEEN_FINDINGS in name:
            raise UsageError(
                f"The name of a finding holds {BETWEEN_FINDINGS}, which separates findings."
            )
    return BETWEEN_FINDINGS.join(sorted(findings))


def check_length(characters: int) -> None:
    """Raise UsageError if a class name has more than LONGEST_NAME ``characters``."""
    if characters > LONGEST_NAME:
        raise UsageError(
            f"A label has {characters} characters, and a class name has at most {LONGEST_NAME}: "
            "give short labels (--label_table.label names their column)."
        )


def coded_attribute(keyword: str) -> str:
    """Return the field that stores a DICOM keyword. Raises UsageError for any other keyword."""
    if keyword not in CODED_ATTRIBUTES:
        raise UsageError(
            f"{keyword!r} cannot be a label: it may hold free text. Coded attributes are "
            f"{', '.join(CODED_ATTRIBUTES)}."
        )
    return CODED_ATTRIBUTES[keyword]


def has_class_folders(source: str) -> bool:
    """Return whether ``source`` contains a folder: without one, no file has a label."""
    return any(entry.is_folder for entry in storage.children(source))
