"""Find the rows of a ledger that have certain keys, without Spark reading or moving the others.

The keys are pseudonyms. A filter of four to eight bytes a key says which rows may have one of them
(Bloom 1970). Tasks read one column of each ledger file through it, and all columns of the row
groups with a hit only. A filter lets at most about six rows in a million pass without reason: with
one in a thousand, nearly every row group would be read. A filter decides by the key, so rows with
equal keys are always found together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import storage
from medspark.ingest import ledger
from medspark.seeding import hash64
from medspark.spark.task import map_batches

__all__ = ["FindRows", "KeyFilter"]

_KEY_BYTES = 32  # hexadecimal digits of a pseudonym
_BITS_PER_KEY = 32
_PROBES = 8
# Row groups whose keys are read at once: reading many small ones takes longer.
_GROUPS = 64
# Rows of a ledger with, for each filter, whether it let the row pass.
FOUND = pa.schema([*ledger.STORED, ("hits", pa.list_(pa.string()))])
FOUND_SPARK = from_arrow_schema(FOUND)


@dataclass(frozen=True)
class KeyFilter:
    """A set of keys that may hold more than was put in, and never less."""

    bits: npt.NDArray[np.uint8]  # (2^n / 8,)

    @classmethod
    def of(cls, keys: DataFrame) -> KeyFilter:
        """Return the filter of the first column of ``keys``; nulls are no keys.

        The driver receives eight bytes a key.
        """
        hashed = map_batches(keys, _hash_batches, "hashes binary").collect()
        hashes = [np.frombuffer(row["hashes"], np.uint64) for row in hashed]
        return cls.of_hashes(np.concatenate([np.empty(0, np.uint64), *hashes]))

    @classmethod
    def of_hashes(cls, hashes: npt.NDArray[np.uint64]) -> KeyFilter:
        """Return the filter of keys with the hashes ``hashes`` (N,)."""
        size = 1 << max(10, (_BITS_PER_KEY * max(1, len(hashes)) - 1).bit_length())
        flags = np.zeros(size, dtype=bool)
        for probe in range(_PROBES):
            flags[_places(hashes, probe, size)] = True
        return cls(np.packbits(flags, bitorder="little"))

    def passes(self, keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Return for each of ``keys`` (N,) whether it may be in the set; a null is not."""
        hashes, passed = hash_keys(keys), np.asarray(keys.is_valid())
        candidates = np.flatnonzero(passed)
        for probe in range(_PROBES):
            place = _places(hashes[candidates], probe, 8 * len(self.bits))
            set_ = self.bits[place >> np.uint64(3)] >> (place & np.uint64(7)).astype(np.uint8) & 1
            candidates = candidates[set_.astype(bool)]
        found = np.zeros(len(keys), dtype=bool)
        found[candidates] = True
        return found


def _places(hashes: npt.NDArray[np.uint64], probe: int, size: int) -> npt.NDArray[np.uint64]:
    # Two halves of a hash make all probes (Kirsch and Mitzenmacher 2006).
    step = (hashes >> np.uint64(32)) | np.uint64(1)
    with np.errstate(over="ignore"):
        return (hashes + np.uint64(probe) * step) & np.uint64(size - 1)


def hash_keys(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each of ``keys`` (N,), the same on every machine; any for a null."""
    words = _fixed(keys).view("<u8").reshape(-1, _KEY_BYTES // 8)
    # Sixteen random hexadecimal digits are 64 bits.
    return hash64(0, hash64(0, words[:, 0]) ^ words[:, 1])


def _fixed(keys: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return the first 32 bytes of each key, (N * 32,); shorter keys are filled up."""
    filled = pc.fill_null(keys, "0" * _KEY_BYTES)
    values = pa.concat_arrays([pa.array([], pa.string()), *filled.chunks])
    _, offsets, data = values.buffers()
    if len(values) == 0:
        return np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    if (np.diff(ends) == _KEY_BYTES).all():
        return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    padded = [key.encode()[:_KEY_BYTES].ljust(_KEY_BYTES) for key in values.to_pylist()]
    return np.frombuffer(b"".join(padded), np.uint8)


def _hash_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        keys = pa.chunked_array([batch.column(0).drop_null()], pa.string())
        hashes = np.unique(hash_keys(keys))
        yield pa.RecordBatch.from_pydict({"hashes": pa.array([hashes.tobytes()], pa.binary())})


@dataclass(frozen=True)
class FindRows:
    """Reads ledger files and yields their rows that a filter lets pass, in a task.

    ``filters`` are by column. ``hits`` of a row names the columns whose filters let it pass.
    """

    samples: str
    filters: Mapping[str, KeyFilter]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Take batches with the files' paths, relative to the dataset; yield rows of FOUND."""
        filters = {name: each for name, each in self.filters.items() if each.bits.any()}
        for batch in batches if filters else ():
            for name in batch.column(0).to_pylist():
                yield from self._of_file(name, filters)

    def _of_file(self, name: str, filters: Mapping[str, KeyFilter]) -> Iterator[pa.RecordBatch]:
        system, path = storage.filesystem(storage.join(self.samples, name))
        with system.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            for first in range(0, parquet.num_row_groups, _GROUPS):
                groups = range(first, min(first + _GROUPS, parquet.num_row_groups))
                keys = parquet.read_row_groups(groups, columns=list(filters), use_threads=False)
                passed = {name: filter_.passes(keys[name]) for name, filter_ in filters.items()}
                yield from _of_groups(parquet, groups, passed)


def _of_groups(
    parquet: pq.ParquetFile, groups: Sequence[int], passed: Mapping[str, npt.NDArray[np.bool_]]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of ``groups`` that passed; groups without any are not read."""
    start = 0
    for group in groups:
        stop = start + parquet.metadata.row_group(group).num_rows
        here = {name: hits[start:stop] for name, hits in passed.items()}
        anywhere = np.logical_or.reduce(list(here.values()))
        if anywhere.any():
            rows = parquet.read_row_group(group, columns=ledger.STORED.names, use_threads=False)
            yield from _hits(rows, here, np.flatnonzero(anywhere))
        start = stop


def _hits(
    rows: pa.Table, passed: Mapping[str, npt.NDArray[np.bool_]], places: npt.NDArray[np.int64]
) -> Iterator[pa.RecordBatch]:
    hits = [[name for name, hit in passed.items() if hit[place]] for place in places]
    found = rows.take(pa.array(places)).append_column(
        "hits", pa.array(hits, FOUND.field("hits").type)
    )
    yield from found.cast(FOUND).to_batches()
