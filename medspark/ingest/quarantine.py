"""The private list of the files in quarantine: for whoever mends the archive, and for nobody else.

A CSV table of file_key, path, reason and message, readable by its owner alone, outside of the
dataset. It can be lost: the paths of an archive come back when that archive is ingested again.
"""

from __future__ import annotations

import csv
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, Pseudonyms, private_file
from medspark.ingest.sample_set import SampleSet
from medspark.spark import storage

_LOGGER = logging.getLogger(__name__)

_COLUMNS = ("file_key", "path", "reason", "message")

Row = tuple[str, str | None, str, str]


@dataclass(frozen=True)
class QuarantineList:
    """The list of one dataset, over all archives that were ingested into it."""

    path: Path

    @classmethod
    def of(cls, privacy: Privacy, *, dataset: str, source: str) -> QuarantineList:
        """Return the list of ``dataset``. Raises UsageError for a place inside it or ``source``."""
        path = privacy.quarantine_file or private_file(dataset, "quarantine", ".csv")
        for folder in (dataset, source):
            if path.resolve().is_relative_to(Path(folder).resolve()):
                raise UsageError(
                    f"The list of files in quarantine {path} names files of the archive: it should "
                    f"not lie in {folder} (--privacy.quarantine_file)."
                )
        return cls(path)

    def renewed(self, rows: Iterable[Row], *, known: Iterable[tuple[str, str]]) -> str | None:
        """Bring the list up to date and return where it is, or None where nothing is on it.

        It is worth no ingest: what cannot be listed goes to the log.
        """
        try:
            missing = self.update(rows, known=known)
        except (OSError, sqlite3.Error) as error:
            _LOGGER.warning("The files in quarantine are not listed: %s", error)
            return None
        if missing:
            _LOGGER.warning(
                "%d files in quarantine are not in %s until their archives are ingested again",
                missing,
                self.path,
            )
        return str(self.path) if self.path.exists() else None

    def update(self, rows: Iterable[Row], *, known: Iterable[tuple[str, str]] = ()) -> int:
        """Make ``rows`` the list, and return how many of them have no path.

        A row without a path gets the one that the list, or else ``known``, has for its file_key.
        Files that are in no row leave the list. Raises OSError where it cannot be written.
        """
        # On disk, and unlinked: a list may be longer than memory is wide.
        with closing(sqlite3.connect("")) as table:
            table.execute("CREATE TABLE known (file_key TEXT PRIMARY KEY, path TEXT)")
            for paths in (known, self._paths()):
                table.executemany("INSERT OR REPLACE INTO known VALUES (?, ?)", paths)
            table.execute("CREATE TABLE now (file_key, path, reason, message)")
            table.executemany("INSERT INTO now VALUES (?, ?, ?, ?)", rows)
            found = table.execute(
                "SELECT file_key, coalesce(now.path, known.path) AS place, reason, message "
                "FROM now LEFT JOIN known USING (file_key) WHERE place IS NOT NULL ORDER BY place"
            )
            listed = self._write(found)
            (count,) = table.execute("SELECT count(*) FROM now").fetchone()
        return int(count) - listed

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Yield file_key and path of the list as it is; nothing where it is lost or damaged."""
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    yield row["file_key"], row["path"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, csv.Error):
            _LOGGER.warning("The list %s cannot be read and is made anew", self.path)

    def _write(self, rows: Iterator[Row]) -> int:
        """Replace the list, whole, and return the number of its rows; an empty one is not made."""
        first = next(rows, None)
        if first is None and not self.path.exists():
            return 0
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        count = 0
        try:
            with open(draft, "x", encoding="utf-8", newline="", opener=_for_its_owner) as file:
                table = csv.writer(file)
                table.writerow(_COLUMNS)
                for row in chain([first] if first else [], rows):
                    table.writerow(row)
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
        return count


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def staged_rows(
    samples: SampleSet, names: Iterable[str], *, source: str, pseudonyms: Pseudonyms
) -> Iterator[Row]:
    """Yield what tasks have staged (tally.LISTED_NAMES), with the whole path where it is known."""
    for name in names:
        system, path = storage.filesystem(samples.path(name))
        with system.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    sealed = row["sealed_path"]
                    inside = pseudonyms.unseal(sealed) if sealed else None
                    place = storage.join(source, inside) if inside else None
                    yield row["file_key"], place, row["reason"], row["message"]
