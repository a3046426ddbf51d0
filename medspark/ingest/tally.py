"""Write ledger and quarantine files from settled rows, in a Spark task, and report their sums."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medspark import storage
from medspark.images.deidentify import Pseudonyms
from medspark.ingest import ledger
from medspark.ingest.ledger import QUARANTINED, SAMPLE
from medspark.ingest.sealing import seal_conflicts

# Columns of the quarantine files. None links to a file, a ledger row or a sample.
QUARANTINE_NAMES = ["reason", "message"]
# Staged columns from which an ingest makes the private quarantine list.
LISTED_NAMES = ["file_key", "sealed_path", "reason", "message"]
# The sums that a task reports. Numbers are text, since some exceed 64 bits.
SUMS = "what string, kind string, number string"

# Rows wait in memory until a row group is full: a few megabytes.
_GROUP_ROWS = 1 << 12
_KEPT = [*ledger.SCHEMA.names, "present", "speaks_for_file"]
_IDENTITY = ["sample_key", "pixel_key", "patient_key", "label", "split", "site"]

Sums = dict[str, Counter[str]]


@dataclass(frozen=True)
class WriteLedger:
    """Writes the rows that ``ledger.settle`` returns, and reports their sums.

    Each task writes files with unique names and reports the names too, so that only files of
    successful attempts are committed. Without a ``generation``, a task writes only the rows for
    the private quarantine list, below ``staging``. Without ``quarantine``, only the ledger is
    written.
    """

    samples: str
    generation: str | None
    pseudonyms: Pseudonyms
    quarantine: bool = True

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Take rows with the names of ledger.SETTLED_NAMES and yield rows of SUMS."""
        sums: Sums = defaultdict(Counter)
        kept, bad, listed = self._files()
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            tally(rows, sums)
            quarantined = _quarantined(rows)
            bad.add(quarantined.select(QUARANTINE_NAMES))
            listed.add(quarantined.select(LISTED_NAMES))
            if kept.wanted:
                hidden = seal_conflicts(rows.select(_KEPT), self.pseudonyms)
                sums["total"]["sealed"] += len(hidden) - hidden["sealed"].null_count
                generation = pa.repeat(pa.scalar(self.generation), len(hidden))
                kept.add(hidden.append_column("generation", generation))
        for file in (kept, bad, listed):
            sums[file.kind].update(file.close())
        yield reports(sums)

    def _files(self) -> Iterator[File]:
        wanted = self.generation is not None
        for kind in ("ledger", "quarantine"):
            name = f"{kind}/{self.generation}/{uuid.uuid4().hex}.parquet"
            yield File(self.samples, kind, name, wanted and (kind == "ledger" or self.quarantine))
        listed = f"staging/listed/part-{uuid.uuid4().hex}.parquet"
        yield File(self.samples, "listed", listed, self.quarantine)


def tally(rows: pa.Table, sums: Sums) -> None:
    """Add the counts of ``rows`` to ``sums``.

    Present files count by outcome, reason and bytes. Samples count by label and patient, with the
    images that several patients share, and add to the two halves of the digest.
    """
    files = rows.filter(pc.and_(rows["present"], rows["speaks_for_file"]))
    sums["outcome"].update(files["outcome"].to_pylist())
    reasons = files.filter(pc.equal(files["outcome"], QUARANTINED))["reason"]
    sums["reason"].update(reasons.to_pylist())
    samples = rows.filter(pc.equal(rows["outcome"], SAMPLE))
    sums["label"].update(samples["label"].to_pylist())
    sums["total"].update(
        bytes=pc.sum(files["size"]).as_py() or 0,
        frames=len(samples),
        patients=pc.sum(rows["first_of_patient"]).as_py() or 0,
        shared=pc.sum(rows["shared"]).as_py() or 0,
    )
    sums["digest"].update(_digest(samples))


def _digest(samples: pa.Table) -> Counter[str]:
    """Return sums that do not depend on the order of samples, on parts or on file names."""
    halves: Counter[str] = Counter()
    for row in zip(*(samples[name].to_pylist() for name in _IDENTITY), strict=True):
        # JSON keeps rows distinct even if they lack values, for example a split or a site.
        digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()
        # Two sums of 60 bits per row: sums do not depend on the order of rows.
        halves["low"] += int(digest[:15], 16)
        halves["high"] += int(digest[15:30], 16)
    return halves


def digest_of(sums: Sums) -> str:
    """Return the dataset's digest, 32 hexadecimal digits. Equal samples have equal digests."""
    return "".join(f"{sums['digest'][half] % 16**16:016x}" for half in ("low", "high"))


def total(rows: Iterable[tuple[str, str, str]]) -> Sums:
    """Return the sums over the reports of all tasks."""
    sums: Sums = defaultdict(Counter)
    for what, kind, number in rows:
        sums[what][kind] += int(number)
    return sums


def _quarantined(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.and_(rows["speaks_for_file"], pc.equal(rows["outcome"], QUARANTINED)))


def reports(sums: Sums) -> pa.RecordBatch:
    """Return ``sums`` as rows of SUMS."""
    rows = [
        {"what": what, "kind": kind, "number": str(number)}
        for what, counter in sums.items()
        for kind, number in counter.items()
    ]
    text = pa.string()
    return pa.RecordBatch.from_pylist(
        rows, schema=pa.schema([("what", text), ("kind", text), ("number", text)])
    )


@dataclass
class File:
    """A Parquet file that is created with its first row, and written in full row groups."""

    folder: str
    kind: str
    name: str
    wanted: bool = True
    pending: list[pa.Table] = field(default_factory=list)
    writer: pq.ParquetWriter | None = None
    rows: int = 0

    def add(self, table: pa.Table) -> None:
        """Add rows, with the same columns in each call."""
        if not self.wanted or not len(table):
            return
        self.pending.append(table)
        self.rows += len(table)
        if sum(map(len, self.pending)) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> dict[str, int]:
        """Finish the file and return {name: rows}, or {} if no row was added."""
        if self.pending:
            self._flush()
        if self.writer is None:
            return {}
        self.writer.close()
        return {self.name: self.rows}

    def _flush(self) -> None:
        table = pa.concat_tables(self.pending).combine_chunks()
        if self.writer is None:
            system, path = storage.filesystem(storage.join(self.folder, self.name))
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            # Keys are hexadecimal digits: zstd halves them.
            self.writer = pq.ParquetWriter(
                path, table.schema, filesystem=system, compression="zstd", compression_level=1
            )
        self.writer.write_table(table)
        self.pending.clear()
