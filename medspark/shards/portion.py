"""Which rows a part of a split consists of: whole patients, the smaller parts inside the larger."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from medspark.seeding import derive

__all__ = ["portion"]


def portion(patients: npt.NDArray[np.str_], share: float, *, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows, in order, of the first patients who together hold ``share`` of all rows.

    The patients queue in an order that ``seed`` and their own keys alone decide, so that a part
    holds every smaller part of the same seed, and all images of whom it holds one of.
    """
    if share >= 1:
        return np.arange(len(patients), dtype=np.int64)
    keys, patient = np.unique(patients, return_inverse=True)
    queue = np.argsort([derive(seed, "portion", str(key)) for key in keys])
    images = np.bincount(patient, minlength=len(keys))[queue]
    enough = int(np.searchsorted(np.cumsum(images), math.ceil(share * len(patients)))) + 1
    return np.flatnonzero(np.isin(patient, queue[:enough])).astype(np.int64)
