"""Labels and their names: from folders, from a coded DICOM attribute, and of several findings."""

from __future__ import annotations

from collections.abc import Iterable

from medspark.errors import UsageError
from medspark.spark import storage

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

# DICOM attributes that may be labels, by keyword, and where their allow-listed value is kept. Any
# other attribute may hold free text, and free text may hold a name.
CODED_ATTRIBUTES = {
    "Modality": "modality",
    "BodyPartExamined": "body_part",
    "ViewPosition": "view_position",
    "ImageLaterality": "laterality",
    "Laterality": "laterality",
    "PatientSex": "sex",
    "Manufacturer": "manufacturer",
}

# The most characters in the name of a class: a diagnosis has fewer, and free text has more.
LONGEST_NAME = 128

# What separates the findings of a sample, sorted, in its one label; no finding is the empty text.
BETWEEN_FINDINGS = "|"


def from_folders(path: str) -> tuple[str | None, str | None]:
    """Return the (label, split) that the folders of ``path``, relative to the source, tell.

    The label is the folder below ``train``, ``val`` or ``test`` where there is one of these, else
    the first folder (torchvision's ImageFolder).
    """
    folders = path.split("/")[:-1]
    for depth, folder in enumerate(folders):
        split = SPLIT_NAMES.get(folder.lower())
        if split:
            below = folders[depth + 1 :]
            return (below[0] if below else None), split
    return (folders[0] if folders else None), None


def join_findings(names: Iterable[str], no_finding: str) -> str:
    """Return the one label of an image with ``names``, in any order.

    Raises UsageError for a name that holds the separator or is too long.
    """
    found = {name.strip() for name in names} - {"", no_finding}
    check_length(max(map(len, found), default=0))
    for name in found:
        if BETWEEN_FINDINGS in name:
            raise UsageError(
                f"The name of a finding holds {BETWEEN_FINDINGS}, which separates findings."
            )
    return BETWEEN_FINDINGS.join(sorted(found))


def check_length(characters: int) -> None:
    """Raise UsageError where the name of a class has more ``characters`` than can be shown."""
    if characters > LONGEST_NAME:
        raise UsageError(
            f"A label has {characters} characters, and the name of a class has at most "
            f"{LONGEST_NAME}: give short labels (--label_table.label names their column)."
        )


def coded_attribute(keyword: str) -> str:
    """Return the kept attribute that a DICOM keyword names. Raises UsageError for any other."""
    if keyword not in CODED_ATTRIBUTES:
        raise UsageError(
            f"{keyword!r} cannot be a label: it may hold free text. Coded attributes are "
            f"{', '.join(CODED_ATTRIBUTES)}."
        )
    return CODED_ATTRIBUTES[keyword]


def has_class_folders(source: str) -> bool:
    """Return whether any folder is below ``source``: without one no file has a label."""
    return any(entry.is_folder for entry in storage.children(source))
