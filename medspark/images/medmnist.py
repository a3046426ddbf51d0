"""MedMNIST archives (.npz): arrays of images and labels for each split, read without unpickling."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medspark.errors import UsageError
from medspark.images.frame import Pixels

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One image of an archive; ``label`` is the class index, or one 0/1 per finding."""

    split: str
    index: int
    pixels: Pixels
    label: tuple[int, ...]


def is_medmnist(path: Path) -> bool:
    """Return whether ``path`` is an archive with images of at least one split."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(f"{split}_images.npy" in archive.namelist() for split in SPLITS)
    except (OSError, zipfile.BadZipFile):
        return False


def read_medmnist(path: Path) -> Iterator[Example]:
    """Yield the examples of ``path``, uint8 of shape (rows, columns) or (rows, columns, 3).

    Raises UsageError for an archive of another shape (3-D MedMNIST included).
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            for split in SPLITS:
                if f"{split}_images" in archive:
                    images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
                    yield from _examples(path, split, images, labels)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise UsageError(f"{path} is not a whole MedMNIST archive.") from None


def _examples(
    path: Path, split: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> Iterator[Example]:
    flat = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if not flat or images.dtype != np.uint8 or len(images) != len(labels):
        raise UsageError(f"{path} should hold 8-bit images of two dimensions, and their labels.")
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        yield Example(split, index, pixels, tuple(int(one) for one in np.atleast_1d(label)))
