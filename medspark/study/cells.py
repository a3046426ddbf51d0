"""Run a study: a list of cells, run one after the other, each once, and reported together.

A cell is one piece of work, such as training and attacking one network. A study defines three
things: the record of a cell, the cells, and a report on all records. This module does the rest: it
skips finished cells, records failures, logs progress, and keeps the run in MLflow.

    class BackdoorCell(CellRecord):
        rule: str
        seed: int
        attack_success: float | None = None

    def cell(rule: str, seed: int) -> Cell[BackdoorCell]:
        blank = BackdoorCell(rule=rule, seed=seed)

        def work(parent_run_id: str | None) -> BackdoorCell:
            return blank.model_copy(update={"attack_success": federate(rule, seed)})

        file = folder / "cells" / f"{digest(settings_that_decide_the_result)}.json"
        return Cell(f"{rule}, seed {seed}", blank, file, work, alike=(rule,))

    cells = [cell(rule, seed) for rule in rules for seed in seeds]
    with held_study(folder):
        result = run_study(Study(cells, report, entry, track, folder / "mlflow"))

Cells that depend on the figures of others form later stages (``Study.then``). Numbers of cells and
the time left count the stages known so far.

One policy for all studies: a failed cell is recorded with its reason, and the study goes on. The
study succeeds only if every cell finished, and raises RunError otherwise. The finished cells are
kept and reported in either case. The same command, given again, runs only the failed and the
missing cells.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from medspark import ownership
from medspark.config import Config
from medspark.documents import parse_json, read_regular
from medspark.errors import MedsparkError, RunError
from medspark.evaluate.sanity import Flag
from medspark.files import json_digest
from medspark.job import write_result
from medspark.lock import locked
from medspark.redact import safe_text
from medspark.track.config import TrackConfig
from medspark.track.runs import TrackedRun, tracked
from medspark.track.spool import RunEntry

__all__ = [
    "Cell", "CellRecord", "Study", "StudyReport", "digest", "held_study", "run_study",
    "seconds_left",
]  # fmt: skip

logger = logging.getLogger(__name__)

_NAMED_FAILURES = 3


class CellRecord(Config):
    """The record of a cell. A study adds fields that identify the cell and hold its figures."""

    status: Literal["pending", "finished", "failed"] = "pending"
    failure: str = Field("", description="why it failed, in one line")
    flags: tuple[Flag, ...] = Field((), description="sanity checks that its report triggered")
    seconds: float = Field(0.0, description="duration of the whole cell")

    @property
    def finished(self) -> bool:
        """Whether the cell finished."""
        return self.status == "finished"

    @property
    def flagged(self) -> bool:
        """Whether a flag says not to trust the figures under attack."""
        return bool(self.flags)

    @property
    def clean_flagged(self) -> bool:
        """Whether a flag says not to trust the figures on clean images either."""
        return any(flag.of_clean_answers for flag in self.flags)

    @property
    def headline(self) -> str:
        """The text of the progress line for a finished cell."""
        return "finished"


R = TypeVar("R", bound=CellRecord)


@dataclass(frozen=True)
class Cell(Generic[R]):
    """One cell of a study.

    ``blank`` is the record before the cell runs; its fields identify the cell. ``file`` keeps the
    finished record; its name must change with every setting that decides the result. ``work`` gets
    the id of the study's MLflow run, runs the cell under it, and returns the record with its
    figures; it raises MedsparkError if the cell fails. The expected time of a cell is proportional
    to its ``size``, at the pace of the cells that share the longest prefix of ``alike``.
    """

    name: str
    blank: R
    file: Path
    work: Callable[[str | None], R]
    size: float = 1.0
    alike: tuple[str, ...] = ()

    def kept(self) -> R | None:
        """Return the record of the cell if it is finished, under the names of this study."""
        try:
            found = type(self.blank).model_validate(parse_json(read_regular(self.file)))
        except (OSError, ValueError):
            return None
        named = {name: getattr(self.blank, name) for name in self.blank.model_fields_set}
        return found.model_copy(update=named) if found.finished else None

    def do(self, parent_run_id: str | None) -> R:
        """Run the cell, keep its record if it finished, and return the record."""
        began = time.monotonic()
        try:
            record = self.work(parent_run_id)
        except MedsparkError as error:
            logger.warning("the study goes on without a cell (%s): %s", self.name, error)
            failed = {"status": "failed", "failure": _reason(error)}
            return self.blank.model_copy(update=failed)
        ended = {"status": "finished", "seconds": time.monotonic() - began}
        record = record.model_copy(update=ended)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_result(self.file, record.model_dump(mode="json"))
        return record


@dataclass(frozen=True)
class StudyReport:
    """The report on all cells."""

    page: Path  # the page to open first; its folder goes to MLflow
    document: Mapping[str, Any] = field(default_factory=dict)  # for the result document
    summary: Mapping[str, float] = field(default_factory=dict)  # metrics of the study's run
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study(Generic[R]):
    """All cells of a study, its report, and its MLflow run."""

    cells: Sequence[Cell[R]]
    # Writes the report on all records; no record is pending.
    report: Callable[[Sequence[R], TrackedRun], StudyReport]
    entry: RunEntry
    track: TrackConfig
    spool: Path  # folder of the run in MLflow
    # Called after every cell that ran; other cells may be pending.
    after_each: Callable[[Sequence[R]], object] | None = None
    # Later stages, in order. Each gets all records so far, finished or failed, and returns the
    # cells to run next. The same records must give the same cells, so that a study can resume.
    then: Sequence[Callable[[Sequence[R]], Sequence[Cell[R]]]] = ()


@contextmanager
def held_study(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for one study. Raises UsageError if it holds other files or is in use."""
    ownership.claim(folder, "study")
    with locked(folder):
        yield


def run_study(study: Study[R]) -> dict[str, Any]:
    """Run the missing cells, report on all cells, and return the result document.

    Raises RunError that names the failed cells and the report, if a cell failed.
    """
    with tracked(study.spool, study.track, study.entry) as run:
        cells, records = _do_stages(study, run.reference["run_id"])
        report = study.report(records, run)
        failed = [record.status == "failed" for record in records]
        run.end(
            "FAILED" if any(failed) else "FINISHED",
            summary={"cells": len(records), "failed": sum(failed), **report.summary},
            tags=report.tags,
            artifacts=report.page.parent,
            patience_seconds=study.track.patience_seconds,
        )
    if any(failed):
        raise RunError(_failures(cells, records, report.page))
    documents = [record.model_dump(mode="json") for record in records]
    return {"cells": documents, **report.document, "mlflow": run.reference}


def _do_stages(study: Study[R], parent_run_id: str | None) -> tuple[list[Cell[R]], list[R]]:
    """Run the missing cells of every stage; return all cells with their records."""
    cells, records = list(study.cells), _do_missing(study, study.cells, [], parent_run_id)
    for stage in study.then:
        cells += stage(records)
        records = _do_missing(study, cells, records, parent_run_id)
    return cells, records


def _do_missing(
    study: Study[R], cells: Sequence[Cell[R]], done: Sequence[R], parent_run_id: str | None
) -> list[R]:
    """Run the missing ones of ``cells``, the first of which are ``done``; return all records."""
    kept = [*done, *(cell.kept() for cell in cells[len(done) :])]
    records = [record or cell.blank for record, cell in zip(kept, cells, strict=True)]
    missing = [number for number, record in enumerate(kept) if record is None]
    count = len(records)
    if missing and len(missing) < count - len(done):
        logger.info("%d of %d cells are done already", count - len(missing), count)
    for place, number in enumerate(missing):
        cell = cells[number]
        left = seconds_left(
            [cells[other] for other in missing[place:]], zip(cells, records, strict=True)
        )
        about = "" if left is None else f"; about {_duration(left)} left"
        logger.info("cell %d of %d: %s%s", number + 1, count, cell.name, about)
        records[number] = record = cell.do(parent_run_id)
        outcome = record.headline if record.finished else f"FAILED: {record.failure}"
        logger.info("cell %d of %d: %s: %s", number + 1, count, cell.name, outcome)
        if study.after_each is not None:
            study.after_each(records)
    return records


def _failures(cells: Sequence[Cell[R]], records: Sequence[R], page: Path) -> str:
    failed = [
        f"{cell.name} ({record.failure.rstrip('.')})"
        for cell, record in zip(cells, records, strict=True)
        if record.status == "failed"
    ]
    more = len(failed) - _NAMED_FAILURES
    named = failed[:_NAMED_FAILURES] + ([f"and {more} more"] if more > 0 else [])
    return (
        f"{len(failed)} of {len(records)} cells failed: {'; '.join(named)}. The report on the "
        f"others is {page}; the same command tries the failed cells again."
    )


def seconds_left(pending: Iterable[Cell[R]], done: Iterable[tuple[Cell[R], R]]) -> float | None:
    """Estimate the seconds of the ``pending`` cells from the ``done`` ones; None if unknown."""
    paces = [(cell.alike, record.seconds / cell.size) for cell, record in done if record.seconds]
    if not paces:
        return None
    total = 0.0
    for cell in pending:
        agree = [_agreement(cell.alike, alike) for alike, _ in paces]
        closest = [pace for (_, pace), a in zip(paces, agree, strict=True) if a == max(agree)]
        total += cell.size * statistics.fmean(closest)
    return total


def _agreement(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def digest(document: Mapping[str, Any]) -> str:
    """Return a short name for ``document``, the first 16 hexadecimal digits of its SHA-256."""
    return json_digest(document)[:16]


def _reason(error: MedsparkError) -> str:
    """Return the first line of an error; the rest is the traceback of a rank."""
    return next(iter(safe_text(str(error)).splitlines()), type(error).__name__)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
