"""The journal: nothing lost, nothing read twice, no append, no interference between writers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

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
