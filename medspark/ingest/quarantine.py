"""The private list of quarantined files, for the person who repairs the archive.

The list is a CSV table of file_key, path, reason and message. It lies outside the dataset and only
its owner can read it. If it is lost, the next ingest of an archive lists the archive's files again.
"""

from __future__ import annotations

import csv
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from medspark import storage
from medspark.errors import UsageError
from medspark.files import replacing
from medspark.images.deidentify import Privacy, Pseudonyms, private_file
from medspark.ingest.sample_set import SampleSet

_LOGGER = logging.getLogger(__name__)

_COLUMNS = ("file_key", "path", "reason", "message")

Row = tuple[str, str | None, str, str]


@dataclass(frozen=True)
class QuarantineList:
    """The list of one dataset, over all archives ingested into it."""

    path: Path

    @classmethod
    def of(cls, privacy: Privacy, *, dataset: str, source: str) -> QuarantineList:
        """Return the list of ``dataset``. Raises UsageError for a path inside it or ``source``."""
        path = privacy.quarantine_file or private_file(dataset, "quarantine", ".csv")
        check_outside(path, (dataset, source), setting="privacy.quarantine_file")
        return cls(path)

    def renewed(
        self,
        rows: Iterable[Row],
        *,
        known: Iterable[tuple[str, str]],
        completed: Callable[[], Iterable[Row]] | None = None,
    ) -> str | None:
        """Update the list and return its path, or None if there is no list.

        If paths are missing, ``completed`` returns the rows again, with the paths that a listing of
        the archive tells. A list that cannot be written does not fail the ingest: the problem goes
        to the log.
        """
        try:
            missing = self.update(rows, known=known)
            if missing and completed is not None:
                missing = self.update(completed(), known=known)
        except (OSError, sqlite3.Error) as error:
            _LOGGER.warning("The quarantined files are not listed: %s", error)
            return None
        if missing:
            _LOGGER.warning(
                "%d quarantined files are missing from %s until their archives are ingested again",
                missing,
                self.path,
            )
        return str(self.path) if self.path.exists() else None

    def update(self, rows: Iterable[Row], *, known: Iterable[tuple[str, str]] = ()) -> int:
        """Replace the list by ``rows``, and return how many of them have no path.

        A row without a path takes the path that the old list, or else ``known``, has for its
        file_key. Files without a row leave the list. Raises OSError if it cannot be written.
        """
        # An anonymous table on disk: the list may be larger than memory.
        with closing(sqlite3.connect("")) as table:
            table.execute("CREATE TABLE known (file_key TEXT PRIMARY KEY, path TEXT)")
            for paths in (known, self._paths()):
                table.executemany("INSERT OR REPLACE INTO known VALUES (?, ?)", paths)
            table.execute("CREATE TABLE now (file_key, path, reason, message)")
            table.executemany("INSERT INTO now VALUES (?, ?, ?, ?)", rows)
            placed = table.execute(
                "SELECT file_key, coalesce(now.path, known.path) AS place, reason, message "
                "FROM now LEFT JOIN known USING (file_key) WHERE place IS NOT NULL ORDER BY place"
            )
            listed = self._write(placed)
            (count,) = table.execute("SELECT count(*) FROM now").fetchone()
        return int(count) - listed

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Yield (file_key, path) of the current list; nothing if it is lost or damaged."""
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    yield row["file_key"], row["path"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, csv.Error):
            _LOGGER.warning("The list %s cannot be read and is replaced", self.path)

    def _write(self, rows: Iterator[Row]) -> int:
        """Replace the list atomically and return its rows; do not create an empty list."""
        first = next(rows, None)
        if first is None and not self.path.exists():
            return 0
        return write_private(self.path, _COLUMNS, chain([first] if first else [], rows))


def check_outside(path: Path, folders: Iterable[str], *, setting: str) -> None:
    """Raise UsageError if the private list ``path``, which ``setting`` names, lies in a folder."""
    for folder in folders:
        if path.resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(
                f"The private list {path} names files of the archive, so it must not lie in "
                f"{folder}: change --{setting}."
            )


def write_private(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Replace the table ``path`` (CSV), readable by its owner only; return its number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    count = 0
    with (
        replacing(path, durable=True) as draft,
        open(draft, "x", encoding="utf-8", newline="", opener=_for_its_owner) as file,
    ):
        table = csv.writer(file)
        table.writerow(columns)
        for row in rows:
            table.writerow(row)
            count += 1
    return count


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def staged_rows(
    samples: SampleSet, names: Iterable[str], *, source: str, pseudonyms: Pseudonyms
) -> Iterator[Row]:
    """Yield the rows that tasks staged (tally.LISTED_NAMES), with the absolute path if known."""
    for name in names:
        system, path = storage.filesystem(samples.path(name))
        with system.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    sealed = row["sealed_path"]
                    inside = pseudonyms.unseal(sealed) if sealed else None
                    place = storage.join(source, inside) if inside else None
                    yield row["file_key"], place, row["reason"], row["message"]
