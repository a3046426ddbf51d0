"""A study does each cell once, goes on after a failure, and says in the end what failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from medspark.errors import RunError, UsageError
from medspark.study.cells import (
    Cell,
    CellRecord,
    Study,
    StudyReport,
    digest,
    held_study,
    run_study,
    seconds_left,
)
from medspark.track.config import TrackConfig
from medspark.track.spool import RunEntry


class Sum(CellRecord):
    """A cell that adds."""

    terms: tuple[int, ...]
    label: str = "sum"
    total: int | None = None


class Adder:
    """A study of sums that notes what it was asked to do; a sum with 13 in it fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[tuple[int, ...]] = []
        self.reported: list[list[str]] = []
        self.fails = True

    def cell(self, *terms: int, label: str = "sum") -> Cell[Sum]:
        blank = Sum(terms=terms, label=label)

        def work(parent_run_id: str | None) -> Sum:
            assert parent_run_id is not None
            self.done.append(terms)
            if 13 in terms and self.fails:
                raise RunError("13 brings bad luck.\nTraceback: long")
            return blank.model_copy(update={"total": sum(terms)})

        file = self.folder / "cells" / f"{digest({'terms': terms})}.json"
        return Cell(f"sum of {terms}", blank, file, work)

    def report(self, records: Sequence[Sum], run: object) -> StudyReport:
        self.reported.append([record.status for record in records])
        page = self.folder / "report" / "sums.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(" ".join(str(record.total) for record in records))
        return StudyReport(page=page, document={"page": str(page)}, summary={"most": 9.0})

    def run(self, *cells: Cell[Sum], **more: Any) -> dict[str, Any]:
        track = TrackConfig(uri=f"sqlite:///{self.folder / 'm.db'}", system_metrics=False)
        entry = RunEntry(name="sums")
        spool = self.folder / "mlflow"
        return run_study(Study(cells, self.report, entry, track, spool, **more))

    def statuses(self) -> list[tuple[str, float, float]]:
        client = MlflowClient(f"sqlite:///{self.folder / 'm.db'}")
        ids = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(ids, order_by=["attributes.start_time"])
        return [
            (run.info.status, run.data.metrics["cells"], run.data.metrics["failed"]) for run in runs
        ]


@pytest.fixture
def adder(tmp_path: Path) -> Adder:
    return Adder(tmp_path)


def test_a_study_goes_on_after_a_failure_reports_all_and_says_what_failed(adder: Adder) -> None:
    cells = [adder.cell(1, 2), adder.cell(13), adder.cell(4, 5)]

    with pytest.raises(RunError) as raised:
        adder.run(*cells)

    assert adder.done == [(1, 2), (13,), (4, 5)]
    assert adder.reported == [["finished", "failed", "finished"]]
    assert (adder.folder / "report" / "sums.md").read_text() == "3 None 9"
    assert str(raised.value) == (
        "1 of 3 cells failed: sum of (13,) (13 brings bad luck). The report on the others is "
        f"{adder.folder / 'report' / 'sums.md'}; the same command tries the failed cells again."
    )
    assert adder.statuses() == [("FAILED", 3, 1)]


def test_a_failed_cell_is_tried_again_and_a_finished_one_is_not(adder: Adder) -> None:
    cells = [adder.cell(1, 2), adder.cell(13)]
    with pytest.raises(RunError):
        adder.run(*cells)
    adder.fails = False

    result = adder.run(*cells, adder.cell(3))

    assert adder.done == [(1, 2), (13,), (13,), (3,)]
    assert [cell["total"] for cell in result["cells"]] == [3, 13, 3]
    assert result["page"] == str(adder.folder / "report" / "sums.md")
    assert adder.statuses() == [("FINISHED", 3, 0)]  # the run that had failed went on


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"terms": [3]}', b'{"terms": [3], "status": "failed"}']
)
def test_a_record_that_is_damaged_or_of_an_unfinished_cell_is_done_again(
    adder: Adder, content: bytes
) -> None:
    cell = adder.cell(3)
    cell.file.parent.mkdir()
    cell.file.write_bytes(content)

    adder.run(cell)

    assert adder.done == [(3,)]
    assert cell.kept() is not None


def test_a_finished_cell_is_called_as_this_study_calls_it(adder: Adder) -> None:
    adder.run(adder.cell(1, 2))

    kept = adder.cell(1, 2, label="another name").kept()

    assert kept is not None
    assert (kept.label, kept.total) == ("another name", 3)


def test_who_is_interested_sees_the_records_after_every_cell(adder: Adder) -> None:
    seen: list[list[str]] = []

    adder.run(
        adder.cell(1), adder.cell(2),
        after_each=lambda records: seen.append([record.status for record in records]),
    )  # fmt: skip

    assert seen == [["finished", "pending"], ["finished", "finished"]]


def test_progress_names_each_cell_what_came_of_it_and_the_time_left(
    adder: Adder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medspark.study.cells")

    with pytest.raises(RunError):
        adder.run(adder.cell(1), adder.cell(13))

    said = [message for message in caplog.messages if message.startswith("cell ")]
    assert said == [
        "cell 1 of 2: sum of (1,)",
        "cell 1 of 2: sum of (1,): finished",
        "cell 2 of 2: sum of (13,); about 0 s left",
        "cell 2 of 2: sum of (13,): FAILED: 13 brings bad luck.",
    ]


def test_of_many_failures_the_first_three_are_named(adder: Adder) -> None:
    with pytest.raises(RunError, match=r"5 of 5 cells failed: .*\(13, 2\).*; and 2 more\. The"):
        adder.run(*(adder.cell(13, n) for n in range(5)))


def test_a_mistake_in_the_program_ends_the_study(adder: Adder) -> None:
    def work(parent_run_id: str | None) -> Sum:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        adder.run(Cell("broken", Sum(terms=()), adder.folder / "x.json", work))


def test_the_folder_of_a_study_is_held_against_a_second_one(tmp_path: Path) -> None:
    with (
        held_study(tmp_path / "study"),
        pytest.raises(UsageError, match=str(tmp_path)),
        held_study(tmp_path / "study"),
    ):
        pass


def timed(*alike: str, seconds: float = 0.0, size: float = 1.0) -> Any:
    cell = Cell("", CellRecord(), Path("x"), lambda _: CellRecord(), size=size, alike=alike)
    return cell, CellRecord(seconds=seconds)


@pytest.mark.parametrize(
    ("alike", "size", "seconds"),
    [
        (("big", "slow"), 1, 30.0),
        (("big", "other"), 1, 20.0),
        (("small",), 1, 1.0),
        (("new",), 1, (10 + 30 + 1) / 3),
        (("small",), 10, 10.0),
    ],
)
def test_time_left_goes_by_the_cells_that_are_most_alike_and_by_their_size(
    alike: tuple[str, ...], size: float, seconds: float
) -> None:
    done = [timed("big", "fast", seconds=10), timed("big", "slow", seconds=30),
            timed("small", seconds=2, size=2)]  # fmt: skip
    (pending, _) = timed(*alike, size=size)

    assert seconds_left([pending], done) == pytest.approx(seconds)
    assert seconds_left([pending, pending], done) == pytest.approx(2 * seconds)


def test_time_left_is_unknown_before_the_first_cell() -> None:
    assert seconds_left([timed("a")[0]], [timed("a")]) is None


@given(st.dictionaries(st.text(), st.integers() | st.text()), st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_a_document(document, random) -> None:
    shuffled = random.sample(list(document.items()), len(document))

    assert digest(dict(shuffled)) == digest(document)
    assert digest(document | {"more": 1}) != digest(document | {"more": 2})


def test_a_later_stage_is_made_from_the_records_and_is_part_of_the_study(adder: Adder) -> None:
    seen: list[list[int | None]] = []

    def double(records: Sequence[Sum]) -> list[Cell[Sum]]:
        seen.append([record.total for record in records])
        return [adder.cell(record.total, record.total) for record in records if record.total]

    result = adder.run(adder.cell(1), adder.cell(2), then=(double, double))

    assert seen == [[1, 2], [1, 2, 2, 4]]
    assert [cell["total"] for cell in result["cells"]] == [1, 2, 2, 4, 2, 4, 4, 8]
    assert adder.reported == [["finished"] * 8]


def test_a_stage_that_failed_is_named_and_tried_again_and_earlier_cells_are_not(
    adder: Adder,
) -> None:
    stages = (lambda records: [adder.cell(13, len(records))],)
    with pytest.raises(RunError, match=r"1 of 2 cells failed: sum of \(13, 1\)"):
        adder.run(adder.cell(1), then=stages)
    adder.fails = False

    result = adder.run(adder.cell(1), then=stages)

    assert adder.done == [(1,), (13, 1), (13, 1)]
    assert [cell["total"] for cell in result["cells"]] == [1, 14]


def test_a_stage_sees_the_failed_cells_too(adder: Adder) -> None:
    seen: list[str] = []

    def stage(records: Sequence[Sum]) -> list[Cell[Sum]]:
        seen.extend(record.status for record in records)
        return []

    with pytest.raises(RunError):
        adder.run(adder.cell(13), adder.cell(1), then=(stage,))

    assert seen == ["failed", "finished"]
