"""Sums of a ledger do not depend on how its rows are distributed over tasks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medspark.images.deidentify import Pseudonyms
from medspark.ingest import ledger
from medspark.ingest.tally import Sums, WriteLedger, digest_of, tally, total

PSEUDONYMS = Pseudonyms(b"k" * 32)
FLAGS = {"present": True, "shared": False, "first_of_patient": True, "speaks_for_file": True}


def row(number: int, outcome: str = "sample", **values: Any) -> dict[str, Any]:
    known = {
        "source_key": "s",
        "file_key": f"f{number}",
        "sealed_path": f"A/{number}",
        "size": 10,
        "outcome": outcome,
        "label": "A",
        "sample_key": f"k{number}",
    }
    return dict.fromkeys(ledger.SETTLED_NAMES) | known | FLAGS | values


ROWS = [
    row(1),
    row(2, label="B", shared=True),
    row(2, frame=2, label="B", speaks_for_file=False, first_of_patient=False),
    row(3, "duplicate", first_of_patient=False),
    row(4, "quarantined", reason="truncated", message="m", first_of_patient=False),
    row(
        5,
        "quarantined",
        sealed_path=None,
        present=False,
        reason="empty_file",
        first_of_patient=False,
    ),
]
SCHEMA = pa.schema(
    [*ledger.SCHEMA, ("sealed_path", pa.string()), *[(flag, pa.bool_()) for flag in FLAGS]]
)


def written(folder: Path, *tasks: list[dict[str, Any]], generation: str | None = "g") -> Sums:
    """Return the reports of tasks with these rows, each in batches of two."""
    write = WriteLedger(str(folder), generation, PSEUDONYMS)
    reports: list[tuple[str, str, str]] = []
    for rows in tasks:
        batches = pa.Table.from_pylist(rows, schema=SCHEMA).to_batches(max_chunksize=2)
        reports += [tuple(r.values()) for batch in write(batches) for r in batch.to_pylist()]
    return total(reports)


def test_files_count_once_and_samples_by_label(tmp_path: Path) -> None:
    sums = written(tmp_path, ROWS)

    assert sums["outcome"] == {"sample": 2, "duplicate": 1, "quarantined": 1}
    assert sums["reason"] == {"truncated": 1}
    assert sums["label"] == {"A": 1, "B": 2}
    assert sums["total"] == {"bytes": 40, "frames": 3, "patients": 2, "shared": 1, "sealed": 0}


def test_sums_do_not_depend_on_who_adds_up_what(tmp_path: Path) -> None:
    one = written(tmp_path, ROWS)
    several = written(tmp_path, ROWS[4:], [], ROWS[:1], ROWS[1:4][::-1])

    for what in ("outcome", "reason", "label", "total"):
        assert one[what] == several[what]
    assert digest_of(one) == digest_of(several)


@pytest.mark.parametrize(
    "name", ["sample_key", "pixel_key", "patient_key", "label", "split", "site"]
)
def test_the_digest_tells_one_value_of_one_sample(tmp_path: Path, name: str) -> None:
    changed = [ROWS[0] | {name: "other"}, *ROWS[1:]]

    assert digest_of(written(tmp_path, ROWS)) != digest_of(written(tmp_path, changed))
    assert digest_of(written(tmp_path, [])) == "0" * 32


PIXELS = next(name for name in ledger.SCHEMA.names if name.startswith("pixel_"))
IDENTITY = ("sample_key", PIXELS, "patient_key", "label", "split", "site")
CELLS = st.sampled_from([None, "", "a", "b", "a\nb", "null", "\\n", '"', '", "'])
CELLS_OF_A_ROW = st.tuples(*[CELLS] * len(IDENTITY))


@given(CELLS_OF_A_ROW, CELLS_OF_A_ROW)
@example((*"kpqA", None, "train"), (*"kpqA", "train", None))
@example((*"kpqA", "train", "x"), (*"kpq", "A\ntrain", "x", None))
@example((*"kpqA", None, None), (*"kpqA", None, ""))
def test_two_samples_have_one_digest_only_if_they_are_equal(one, other) -> None:
    digests = []
    for cells in (one, other):
        sample = dict.fromkeys(ledger.SETTLED_NAMES) | {"outcome": "sample"}
        sample |= dict(zip(IDENTITY, cells, strict=True))
        sums: Sums = defaultdict(Counter)
        tally(pa.Table.from_pylist([sample | FLAGS], schema=SCHEMA), sums)
        digests.append(digest_of(sums))

    assert (digests[0] == digests[1]) == (one == other)


def test_a_sample_that_is_there_twice_is_not_one_that_is_there_once(tmp_path: Path) -> None:
    once, twice = (written(tmp_path, [ROWS[0]] * times) for times in (1, 2))

    assert digest_of(once) != digest_of(twice)


def test_tasks_write_files_of_their_own_and_say_which(tmp_path: Path) -> None:
    sums = written(tmp_path, ROWS[:2], ROWS[2:], [])

    stored = [pq.read_table(tmp_path / name) for name in sums["ledger"]]
    assert [len(table) for table in stored] == list(sums["ledger"].values()) == [2, 4]
    assert stored[0].schema.names == ledger.STORED.names
    (name,), (staged,) = sums["quarantine"], sums["listed"]
    assert pq.read_table(tmp_path / name)["reason"].to_pylist() == ["truncated", "empty_file"]
    assert pq.read_table(tmp_path / staged)["file_key"].to_pylist() == ["f4", "f5"]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.parquet")} == {
        *sums["ledger"],
        name,
        staged,
    }


def test_nothing_in_the_quarantine_leads_to_a_row_of_the_ledger(tmp_path: Path) -> None:
    sums = written(tmp_path, [row(4, "quarantined", reason="truncated", message="m", size=77)])

    (name,), (staged,) = sums["quarantine"], sums["ledger"]
    told = pq.read_table(tmp_path / name).to_pylist()
    assert told == [{"reason": "truncated", "message": "m"}]
    assert not {name, staged.rpartition("/")[2]} & {staged, name.rpartition("/")[2]}


def test_without_a_generation_there_are_sums_and_only_the_list_is_staged(tmp_path: Path) -> None:
    sums = written(tmp_path, ROWS, generation=None)

    assert sums["total"]["frames"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


def test_rows_of_contradicting_labels_keep_nothing_of_a_patient_in_clear(tmp_path: Path) -> None:
    whose = {"sample_key": "k-7", "patient_key": "p-7", "label": "l-7", "split": "s-7",
             "site": "h-7", "part": "d-7", "row": 3}  # fmt: skip
    conflict = row(7, "quarantined", reason="conflicting_label", pixel_key="x", **whose)

    sums = written(tmp_path, [ROWS[0], conflict])

    (name,) = sums["ledger"]
    first, hidden = pq.read_table(tmp_path / name).to_pylist()
    assert (first["sample_key"], first["sealed"], sums["total"]["sealed"]) == ("k1", None, 1)
    assert {hidden[key] for key in whose} == {None}
    assert json.loads(PSEUDONYMS.unseal(hidden["sealed"])) == list(whose.values())


def test_a_task_of_many_rows_keeps_few_of_them_in_memory(tmp_path: Path) -> None:
    sums = written(tmp_path, [row(number) for number in range(9_000)])

    ((name, rows),) = sums["ledger"].items()
    file = pq.ParquetFile(tmp_path / name).metadata
    groups = [file.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(groups) == rows == 9_000
    assert max(groups) < 5_000
