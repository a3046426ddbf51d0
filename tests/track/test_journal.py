"""The journal: nothing lost, nothing read twice, no append, no interference between writers."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.track.journal import Journal, JournalReader


def _steps(reader: JournalReader) -> list[int]:
    return [record.step for record in reader.poll()]


def test_a_reader_sees_each_record_once_and_in_order(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path)
    journal = Journal(tmp_path, flush_seconds=0)

    journal.record(0, {"loss": 1.0})
    journal.record(1, {"loss": 0.5, "rate": 3})

    first = list(reader.poll())
    assert [record.metrics for record in first] == [{"loss": 1.0}, {"loss": 0.5, "rate": 3.0}]
    assert _steps(reader) == []
    journal.record(2, {"loss": 0.2})
    assert _steps(reader) == [2]


def test_records_are_buffered_until_a_flush(tmp_path: Path) -> None:
    with Journal(tmp_path, flush_seconds=3600) as journal:
        for step in range(100):
            journal.record(step, {"loss": 0.0})
        assert len(list(tmp_path.glob("*.jsonl"))) == 1

    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert _steps(JournalReader(tmp_path)) == list(range(100))


def test_a_resumed_run_continues_the_journal_it_finds(tmp_path: Path) -> None:
    Journal(tmp_path, flush_seconds=0).record(0, {"loss": 1.0})
    Journal(tmp_path, flush_seconds=0).record(1, {"loss": 0.5})

    assert _steps(JournalReader(tmp_path)) == [0, 1]


def test_two_writers_never_replace_each_others_segments(tmp_path: Path) -> None:
    stale, fresh = Journal(tmp_path, flush_seconds=0), Journal(tmp_path, flush_seconds=0)

    fresh.record(5, {"loss": 0.1})
    stale.record(4, {"loss": 0.2})

    assert sorted(_steps(JournalReader(tmp_path))) == [4, 5]


def test_an_incomplete_segment_is_read_when_it_is_complete(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path)
    segment = tmp_path / "00000000-abc.jsonl"
    segment.write_text('[0, 1, {"lo')
    assert _steps(reader) == []

    segment.write_text('[0, 1, {"loss": 2.0}]\n')

    assert _steps(reader) == [0]


@given(st.permutations(range(5)), st.integers(1, 60))
def test_nothing_is_lost_and_order_is_kept_however_late_segments_become_whole(
    order: list[int], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        whole = {number: f'[{number}, 1, {{"loss": {number}.5}}]\n' for number in range(5)}
        paths = {number: Path(place, f"{number:08d}-abc.jsonl") for number in range(5)}
        for number, path in paths.items():
            path.write_text(whole[number][: min(cut, len(whole[number]) - 2)])
        reader, seen = JournalReader(Path(place)), []
        for number in order:
            seen += _steps(reader)
            paths[number].write_text(whole[number])
            assert seen == list(range(len(seen)))

        assert seen + _steps(reader) == list(range(5))


@pytest.mark.parametrize(
    "line", ["3", "[1]", "[1, 2, 3]", '[1, 2, {"a": "b"}]', "[" * 100_000, '[1, 2, {"a": []}]']
)
def test_what_is_no_record_holds_the_journal_up_and_raises_nothing(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "00000000-abc.jsonl").write_text(line)

    assert _steps(JournalReader(tmp_path)) == []


def test_files_of_other_names_are_no_segments(tmp_path: Path) -> None:
    for name in ("notes.jsonl", "x-y.jsonl", "00000001-abc.tmp"):
        (tmp_path / name).write_text("{}")

    Journal(tmp_path, flush_seconds=0).record(3, {"loss": 1.0})

    assert _steps(JournalReader(tmp_path)) == [3]
    assert len(list(tmp_path.glob("00000000-*.jsonl"))) == 1


def test_an_endless_segment_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "00000000-abc.jsonl").symlink_to("/dev/zero")

    assert _steps(JournalReader(tmp_path)) == []


def test_a_journal_without_a_directory_discards(tmp_path: Path) -> None:
    with Journal(None) as journal:
        journal.record(0, {"loss": 1.0})

    assert _steps(JournalReader(tmp_path)) == []


def test_not_a_number_survives_the_journal(tmp_path: Path) -> None:
    Journal(tmp_path, flush_seconds=0).record(0, {"loss": math.nan})

    (record,) = JournalReader(tmp_path).poll()

    assert math.isnan(record.metrics["loss"])


def test_a_disk_that_refuses_keeps_the_records_for_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "journal"
    journal = Journal(directory, flush_seconds=0)
    directory.rmdir()

    journal.record(0, {"loss": 1.0})

    assert "kept in memory" in caplog.text
    directory.mkdir()
    journal.record(1, {"loss": 0.5})
    assert _steps(JournalReader(directory)) == [0, 1]
