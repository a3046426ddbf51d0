"""Rows of a ledger are found by their keys: none is missed, and hardly any found in vain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.ingest import ledger
from medspark.ingest.lookup import FindRows, KeyFilter, hash_keys

KEYS = st.one_of(st.integers(0, 99).map(lambda n: key(n)), st.text("abcé", max_size=40))


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def column(keys: Sequence[str | None]) -> pa.ChunkedArray:
    return pa.chunked_array([keys], pa.string())


@given(st.lists(KEYS, max_size=50), st.lists(KEYS, max_size=50))
def test_a_filter_misses_no_key_and_takes_no_null(inside: list[str], others: list[str]) -> None:
    keys = KeyFilter.of_hashes(hash_keys(column(inside)))

    passed = keys.passes(column([*inside, None, *others]))

    assert passed[: len(inside)].all()
    assert not passed[len(inside)]


def test_hardly_a_key_passes_without_reason() -> None:
    count = 16_384  # the fewest bytes a key: their number is a power of two
    inside = KeyFilter.of_hashes(hash_keys(column([key(n) for n in range(count)])))

    passed = inside.passes(column([key(n) for n in range(count, count + 200_000)]))

    assert passed.sum() <= 20
    assert len(inside.bits) == 4 * count


@given(st.lists(KEYS, min_size=1, max_size=20), st.integers(0, 19))
def test_a_key_has_one_hash_in_whatever_column_it_is(keys: list[str], start: int) -> None:
    whole = hash_keys(column(keys))
    parts = pa.chunked_array([column(keys[:start]).chunk(0), column(keys[start:]).chunk(0)])

    assert np.array_equal(whole, hash_keys(parts))
    assert np.array_equal(whole[start:], hash_keys(column(keys).slice(start)))


def test_rows_are_read_with_the_columns_they_were_found_by(tmp_path: Path) -> None:
    rows = [
        dict.fromkeys(ledger.STORED.names)
        | {"file_key": key(n), "pixel_key": key(n // 2), "frame": n}
        for n in range(1000)
    ]
    pq.write_table(pa.Table.from_pylist(rows, ledger.STORED), tmp_path / "l", row_group_size=100)
    wanted = {
        "file_key": KeyFilter.of_hashes(hash_keys(column([key(7)]))),
        "pixel_key": KeyFilter.of_hashes(hash_keys(column([key(3), key(50)]))),
    }

    names = pa.RecordBatch.from_pydict({"name": ["l"]})
    found = [row for b in FindRows(str(tmp_path), wanted)([names]) for row in b.to_pylist()]

    assert {row["frame"]: row["hits"] for row in found} == {
        6: ["pixel_key"], 7: ["file_key", "pixel_key"], 100: ["pixel_key"], 101: ["pixel_key"],
    }  # fmt: skip


def test_only_row_groups_with_a_hit_are_read_and_without_keys_no_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [dict.fromkeys(ledger.STORED.names) | {"pixel_key": key(n)} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows, ledger.STORED), tmp_path / "l", row_group_size=10)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def noted(file: Any, group: int, **given: Any) -> Any:
        read.append(group)
        return whole(file, group, **given)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)

    def found(wanted: Sequence[str | None], name: str = "l") -> list[str]:
        filters = {"pixel_key": KeyFilter.of_hashes(hash_keys(column(wanted)))}
        asked = pa.RecordBatch.from_pydict({"name": [name]})
        batches = FindRows(str(tmp_path), filters)([asked])
        return [row["pixel_key"] for batch in batches for row in batch.to_pylist()]

    assert found([key(5), key(649), key(999)]) == [key(5), key(649), key(999)]
    assert read == [0, 64, 99]
    assert found([], "a file that is not there") == []
