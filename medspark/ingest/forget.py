"""Remove patients from a sample dataset: their ledger rows, their quarantine and their pixels.

The parts that hold their pixels are written again in a new generation. There, a row of theirs is
blank: it keeps its place, since the ledger counts rows, and holds nothing. Then the new manifest is
committed, and every file that it does not name is removed from disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark import ownership, storage
from medspark.config import Config
from medspark.documents import open_regular
from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, Pseudonyms, load_key
from medspark.images.resident import pseudonyms_of
from medspark.ingest import ledger
from medspark.ingest.migrate import PARTS, is_former
from medspark.ingest.parts import SAMPLE_SCHEMA, Part, rewrite
from medspark.ingest.quarantine import QuarantineList, staged_rows
from medspark.ingest.sample_set import (
    SCHEMA_VERSION,
    SampleSet,
    SamplesManifest,
    new_generation,
)
from medspark.ingest.sealing import unsealed
from medspark.ingest.tally import SUMS, Sums, WriteLedger, digest_of, total
from medspark.lock import locked
from medspark.spark.cluster import default_parallelism
from medspark.spark.session import task_errors
from medspark.spark.task import map_batches

__all__ = ["Dataset", "ForgetConfig", "Patients", "forget", "open_dataset", "read_patients"]

_KEY = re.compile("[0-9a-f]{32}")


class ForgetConfig(Config):
    """Configuration of a removal: the dataset, and the patients who leave it."""

    samples: str = Field(description="folder of the sample dataset that jobs/ingest.py wrote")
    patients: Path = Field(
        description="text file with a patient a line: the PatientID as the archive or its label "
        "table has it, or the pseudonymous patient_key of the samples"
    )
    privacy: Privacy = Field(default_factory=Privacy)
    dry_run: bool = Field(False, description="report what would be removed, and change nothing")


@dataclass(frozen=True)
class Patients:
    """The pseudonyms of the patients to remove, with the lines of the file that name each."""

    lines: Mapping[str, tuple[int, ...]]

    @property
    def keys(self) -> tuple[str, ...]:
        """All pseudonyms that the file can mean, sorted."""
        return tuple(sorted(self.lines))

    def unknown(self, found: Iterable[str]) -> list[int]:
        """Return the lines that name none of the patients ``found``."""
        known = {line for key in found for line in self.lines[key]}
        every = {line for lines in self.lines.values() for line in lines}
        return sorted(every - known)


@dataclass(frozen=True)
class Dataset:
    """A dataset from which patients are removed, with its key and its private list."""

    samples: SampleSet
    manifest: SamplesManifest
    pseudonyms: Pseudonyms
    quarantined: QuarantineList


def open_dataset(config: ForgetConfig) -> Dataset:
    """Check everything that can be checked without Spark. Raises UsageError for a problem."""
    samples = SampleSet(config.samples)
    ownership.check(samples.url, "samples")
    manifest = samples.manifest()
    if manifest is None:
        raise UsageError(f"{config.samples} holds no samples: no ingest has finished there.")
    if is_former(manifest):
        raise UsageError(f"{config.samples} has an earlier format: ingest into it once more.")
    key = load_key(config.privacy, dataset=samples.url, new=False)
    pseudonyms = pseudonyms_of(config.privacy, key)
    if pseudonyms.check != manifest.key_check:
        raise UsageError(
            f"{config.samples} was made with another pseudonym key; name that key's file with "
            "--privacy.key_file."
        )
    listed = QuarantineList.of(config.privacy, dataset=samples.url, source=samples.url)
    return Dataset(samples, manifest, pseudonyms, listed)


def read_patients(path: Path, pseudonyms: Pseudonyms) -> Patients:
    """Return the patients that the text file ``path`` names; empty lines are skipped.

    Raises UsageError if the file cannot be read, or names nobody.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"patients: cannot read '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"patients: '{path}' is not UTF-8 text.") from error
    found: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines, start=1):
        named = line.strip()
        meant = [pseudonyms.patient(named)] if named else []
        meant += [named] if _KEY.fullmatch(named) else []
        for key in meant:
            found[key] = (*found.get(key, ()), number)
    if not found:
        raise UsageError(f"patients: '{path}' names no patient.")
    return Patients(found)


def forget(
    spark: SparkSession, dataset: Dataset, patients: Patients, *, dry_run: bool = False
) -> dict[str, Any]:
    """Remove ``patients`` from the dataset and return counts of what was removed.

    Samples of other patients stay samples; an image that was a duplicate of a removed one becomes a
    sample. A removal that is killed changes nothing or is complete but for old files, which the
    next one removes. Raises UsageError if another job holds the dataset.
    """
    ownership.claim(dataset.samples.url, "samples")
    with locked(dataset.samples.url) as is_held, task_errors():
        dataset.samples.clean()
        try:
            work = _Removal(spark, dataset, patients)
            return work.preview() if dry_run else work.run()
        finally:
            if is_held():
                dataset.samples.clean()


class _Removal:
    """One removal, step by step."""

    def __init__(self, spark: SparkSession, dataset: Dataset, patients: Patients) -> None:
        self._spark, self._dataset, self._patients = spark, dataset, patients
        self._samples = dataset.samples
        # Read again, now that nobody else writes.
        self._manifest = dataset.samples.manifest() or dataset.manifest
        self._generation = new_generation()
        rows = self._samples.read_ledger(spark, self._manifest.ledger, self._manifest.superseded)
        self._ledger = unsealed(rows, dataset.pseudonyms) if self._manifest.sealed else rows
        self._theirs = F.coalesce(F.col("patient_key").isin(*patients.keys), F.lit(False))

    def preview(self) -> dict[str, Any]:
        """Return what would be removed."""
        theirs = self._ledger.where(self._theirs)
        counts = {
            row["outcome"]: row["count"] for row in theirs.groupBy("outcome").count().collect()
        }
        found = [row["patient_key"] for row in theirs.select("patient_key").distinct().collect()]
        return {
            "patients": len(found),
            "unknown_lines": self._patients.unknown(found),
            "samples": counts.get(ledger.SAMPLE, 0),
            "duplicates": counts.get(ledger.DUPLICATE, 0),
            "quarantined": counts.get(ledger.QUARANTINED, 0),
            "files": theirs.select("file_key").distinct().count(),
        }

    def run(self) -> dict[str, Any]:
        """Remove everything, and return what was removed."""
        result = self.preview()
        renewed = self._renewed_parts()
        if not result["files"] and not renewed:
            return result | {"parts": 0, "bytes": 0}
        sums = self._settled(renewed)
        self._commit(renewed, sums)
        listed = staged_rows(
            self._samples, sums["listed"], source="", pseudonyms=self._dataset.pseudonyms
        )
        self._dataset.quarantined.renewed(listed, known=())
        written = sum(part.bytes for part in renewed.values())
        return result | {"parts": len(renewed), "bytes": written}

    def _renewed_parts(self) -> dict[str, Part]:
        """Write every part that holds pixels of the patients again; return them by the old path."""
        rows = [(p.path, p.rows, p.bytes, p.sha256) for p in self._manifest.parts]
        if not rows:
            return {}
        tasks = min(len(rows), 8 * default_parallelism(self._spark))
        table = self._spark.createDataFrame(rows, PARTS).repartition(tasks)
        blank = _BlankRows(self._samples.url, self._generation, self._patients.keys)
        found = map_batches(table, blank, f"old string, {PARTS}").collect()
        return {
            row["old"]: Part(
                path=row["path"], rows=row["rows"], bytes=row["bytes"], sha256=row["sha256"]
            )
            for row in found
        }

    def _settled(self, renewed: Mapping[str, Part]) -> Sums:
        """Write the ledger without the patients, and return its sums."""
        moved = [(old, new.path) for old, new in renewed.items()] or [("", "")]
        paths = F.broadcast(self._spark.createDataFrame(moved, "part string, moved string"))
        rows: DataFrame = (
            self._ledger.where(~self._theirs)
            .join(paths, "part", "left")
            .withColumn("part", F.coalesce("moved", "part"))
            .withColumn("sealed_path", F.lit(None).cast("string"))
            .withColumn("present", F.lit(True))
            .select(ledger.ROW_NAMES)
        )
        write = WriteLedger(self._samples.url, self._generation, self._dataset.pseudonyms)
        return total(map_batches(ledger.settle(rows), write, SUMS).collect())

    def _commit(self, renewed: Mapping[str, Part], sums: Sums) -> None:
        outcome, before = sums["outcome"], self._manifest
        counts = {
            "files_seen": sum(outcome.values()),
            "samples": outcome[ledger.SAMPLE],
            "duplicates": outcome[ledger.DUPLICATE],
            "quarantined": outcome[ledger.QUARANTINED],
            "frames": sums["total"]["frames"],
            "patients": sums["total"]["patients"],
        }
        self._samples.commit(
            before.model_copy(
                update={
                    "generation": self._generation,
                    # No earlier generation stays: its files hold what was removed.
                    "previous": None,
                    "retired": (),
                    "superseded": (),
                    "settled": None,
                    "schema_version": SCHEMA_VERSION,
                    "digest": digest_of(sums),
                    "counts": counts,
                    "parts": tuple(renewed.get(part.path, part) for part in before.parts),
                    "ledger": tuple(sorted(sums["ledger"])),
                    "quarantine": tuple(sorted(sums["quarantine"])),
                    "sealed": sums["total"]["sealed"],
                }
            )
        )


@dataclass(frozen=True)
class _BlankRows:
    """Writes parts again, with blank rows in place of some patients'; other parts it leaves."""

    samples: str
    generation: str
    keys: Sequence[str]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                part = Part.model_validate(row)
                if self._holds(part.path):
                    name = f"data/{self.generation}/{part.path.rpartition('/')[2]}"
                    new = rewrite(self.samples, part, name, self._blank)
                    yield pa.RecordBatch.from_pylist([{"old": part.path} | new.model_dump()])

    def _holds(self, name: str) -> bool:
        system, path = storage.filesystem(storage.join(self.samples, name))
        with system.open(path, "rb") as file:
            found = pq.read_table(file, columns=["patient_key"])["patient_key"]
        return bool(pc.any(self._theirs(found)).as_py())

    def _theirs(self, patients: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.is_in(patients, pa.array(self.keys, pa.string()))

    def _blank(self, table: pa.Table) -> pa.Table:
        theirs = self._theirs(table["patient_key"])
        columns = {
            field.name: pc.if_else(theirs, _nothing(field), table[field.name])
            for field in SAMPLE_SCHEMA
        }
        return pa.table(columns, schema=SAMPLE_SCHEMA)


def _nothing(field: pa.Field) -> pa.Scalar:
    """Return null, or the empty value of a column that has no null."""
    if field.nullable:
        return pa.scalar(None, field.type)
    return pa.scalar({pa.string(): "", pa.binary(): b""}.get(field.type, 0), field.type)
