"""Group the rows of a split by a key, such as the patient, without a string for every row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["Groups", "read_groups"]

_CODED = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class Groups:
    """The sorted, distinct ``keys`` (G,), and for each row the place of its key, ``codes`` (N,).

    The keys stay with Arrow: a Python string for each of a million patients takes 60 MB.
    """

    keys: pa.StringArray
    codes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, values: Iterable[str]) -> Groups:
        """Return the groups of rows with the keys ``values`` (N,)."""
        return _grouped([pa.array(values, pa.string()).dictionary_encode()])

    def places_in(self, known: Groups) -> npt.NDArray[np.int64]:
        """Return the place (N,) of each row's key among the keys of ``known``, -1 for others."""
        found = pc.index_in(self.keys, value_set=known.keys).fill_null(-1)
        places: npt.NDArray[np.int64] = found.to_numpy().astype(np.int64)
        return places[self.codes]


def read_groups(paths: Iterable[Path], column: Literal["patient_key", "site"]) -> Groups:
    """Return the groups of all rows of some shards, in their order, by ``column``.

    The key of an unknown site is "". Shards of schema versions 1 and 2 know no site.
    """
    return _grouped([part for path in paths for part in _parts(path, column)])


def _grouped(parts: list[pa.DictionaryArray]) -> Groups:
    coded = pa.chunked_array(parts, _CODED).unify_dictionaries()
    keys = coded.chunk(0).dictionary if parts else pa.array([], pa.string())
    order = pc.array_sort_indices(keys)
    places = np.empty(len(keys), dtype=np.int32)
    places[order.to_numpy()] = np.arange(len(keys), dtype=np.int32)
    codes = [places[part.indices.to_numpy()] for part in coded.chunks]
    return Groups(keys.take(order), np.concatenate([np.empty(0, np.int32), *codes]))


def _parts(path: Path, column: str) -> Iterator[pa.DictionaryArray]:
    """Yield the column of each row group of a shard, with "" for null."""
    # By row groups and without pre_buffer, because the whole column takes five times the memory.
    with pq.ParquetFile(path, read_dictionary=[column], pre_buffer=False) as file:
        if column not in file.schema_arrow.names:
            unknown = np.zeros(file.metadata.num_rows, dtype=np.int32)
            yield pa.DictionaryArray.from_arrays(unknown, pa.array([""]))
            return
        for group in range(file.metadata.num_row_groups):
            for part in file.read_row_group(group, columns=[column])[column].chunks:
                yield _without_nulls(part) if part.null_count else part


def _without_nulls(part: pa.DictionaryArray) -> pa.DictionaryArray:
    keys = pa.concat_arrays([part.dictionary, pa.array([""])])
    return pa.DictionaryArray.from_arrays(part.indices.fill_null(len(part.dictionary)), keys)
