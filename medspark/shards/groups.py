"""Group the rows of a split by a key, such as the patient, without a string for every row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

__all__ = ["Groups", "read_groups"]


@dataclass(frozen=True)
class Groups:
    """The sorted, distinct ``keys`` (G,), and for each row the place of its key, ``codes`` (N,)."""

    keys: npt.NDArray[np.str_]
    codes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: npt.NDArray[np.str_]) -> Groups:
        """Return the groups of rows with the keys ``values`` (N,)."""
        keys, codes = np.unique(values, return_inverse=True)
        return cls(keys, codes.astype(np.int64))


def read_groups(paths: Iterable[Path], column: Literal["patient_key", "site"]) -> Groups:
    """Return the groups of all rows of some shards, in their order, by ``column``.

    The key of an unknown site is "". Shards of schema versions 1 and 2 know no site.
    """
    parts = [_of_shard(path, column) for path in paths]
    keys = np.unique(np.concatenate([np.empty(0, np.str_), *(part.keys for part in parts)]))
    codes = [np.searchsorted(keys, part.keys)[part.codes] for part in parts]
    return Groups(keys, np.concatenate([np.empty(0, np.int64), *codes]))


def _of_shard(path: Path, column: str) -> Groups:
    # Never a string for every row: ten thousand patients have fewer keys than images.
    file = pq.ParquetFile(path, read_dictionary=[column])
    if column not in file.schema_arrow.names:
        return Groups(np.array([""]), np.zeros(file.metadata.num_rows, dtype=np.int64))
    table = file.read(columns=[column], use_threads=False)
    coded = table[column].unify_dictionaries().combine_chunks()
    known = coded.dictionary.to_pylist()
    keys = [*known, ""] if coded.null_count else known
    codes = coded.indices.fill_null(len(known)).to_numpy()
    return Groups(np.asarray(keys, dtype=np.str_), codes.astype(np.int64))
