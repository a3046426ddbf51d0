"""Select a share of a split by whole patients; a smaller share is a subset of a larger one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from medspark.seeding import derive
from medspark.shards.groups import Groups

__all__ = ["portion"]


def portion(patients: Groups, share: float, *, seed: int) -> npt.NDArray[np.int64]:
    """Return the sorted rows of the first patients who together have ``share`` of the rows or more.

    ``patients`` groups the N rows by patient key. The order of the patients depends only on
    ``seed`` and their keys. So a share contains every smaller share of the same seed, and a
    patient's images are all in it or all out.
    """
    keys, patient = patients.keys, patients.codes
    if share >= 1:
        return np.arange(len(patient), dtype=np.int64)
    queue = np.argsort([derive(seed, "portion", key.as_py()) for key in keys])
    images = np.bincount(patient, minlength=len(keys))[queue]
    enough = int(np.searchsorted(np.cumsum(images), math.ceil(share * len(patient)))) + 1
    return np.flatnonzero(np.isin(patient, queue[:enough])).astype(np.int64)
