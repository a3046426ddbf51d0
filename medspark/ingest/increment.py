"""Settle what an ingest changes, at a cost that grows with the changes and not with the ledger.

A verdict on an image depends on the rows with its pixels; the counts of a patient and of a file
depend on their rows. So an increment finds all rows that share pixels, patient or file with what is
new, changed or gone, settles these, and writes them again. The rows that they replace stay in their
files and are named as superseded. Sums of the whole ledger are the last ones, less the sums of
the replaced rows, plus those of the new ones.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark.images.deidentify import Pseudonyms
from medspark.ingest import ledger
from medspark.ingest.lookup import FOUND_SPARK, FindRows, KeyFilter
from medspark.ingest.sample_set import SampleSet, SamplesManifest, Settled
from medspark.ingest.sealing import unsealed
from medspark.ingest.tally import LISTED_NAMES, SUMS, File, Sums, WriteLedger, reports, total
from medspark.spark.cluster import default_parallelism
from medspark.spark.task import map_batches

__all__ = ["Increment", "Replaced", "settled_of", "sums_of"]

# What describes a whole ledger; the other sums name files.
_STANDING = ("outcome", "reason", "label", "total", "digest")
# Outside of these, settling everything anew is cheaper, or keeps later readers fast.
_FEWEST_ROWS = 5_000
_MOST_SUPERSEDED, _MOST_NEW, _MOST_FILES = 0.2, 0.2, 4096


def settled_of(sums: Sums, source_key: str, *, rows: int, superseded: int = 0) -> Settled:
    """Return what the next increment needs to know of ``sums``."""
    kept = {what: {k: n for k, n in sums[what].items() if n} for what in _STANDING}
    return Settled(source_key=source_key, sums=kept, rows=rows, superseded=superseded)


def sums_of(settled: Settled) -> Sums:
    """Return the sums that ``settled`` holds."""
    return defaultdict(Counter, {what: Counter(settled.sums[what]) for what in _STANDING})


@dataclass(frozen=True)
class Replaced:
    """An increment: the sums of the new ledger, the files that it adds, and exchanged samples."""

    sums: Sums  # "ledger" and "superseded" name the added files
    settled: Settled
    added: int
    removed: int


class Increment:
    """One increment of the dataset that ``manifest`` describes."""

    def __init__(
        self,
        spark: SparkSession,
        samples: SampleSet,
        manifest: SamplesManifest,
        *,
        generation: str,
        source_key: str,
        pseudonyms: Pseudonyms,
        staged: Callable[[str, DataFrame], DataFrame],
    ) -> None:
        """``staged`` computes rows once, and keeps them under a name of small letters."""
        self._spark, self._samples, self._manifest = spark, samples, manifest
        self._staged = staged
        self._generation, self._source_key = generation, source_key
        self._pseudonyms = pseudonyms

    @staticmethod
    def fits(manifest: SamplesManifest | None, source_key: str, *, touched: int) -> bool:
        """Return whether ``touched`` files are few enough, and the sums of the ledger are known."""
        settled = manifest.settled if manifest else None
        if manifest is None or settled is None or settled.source_key != source_key:
            return False
        few = settled.rows >= _FEWEST_ROWS and touched <= _MOST_NEW * settled.rows
        tidy = settled.superseded <= _MOST_SUPERSEDED * settled.rows
        return few and tidy and len(manifest.ledger) + len(manifest.superseded) <= _MOST_FILES

    def known(self, files: DataFrame) -> DataFrame:
        """Return the stored rows of ``files``, and perhaps of a few others, by their file_key."""
        return self._found({"file_key": KeyFilter.of(files.select("file_key"))})

    def settle(self, touched: DataFrame, fresh: DataFrame) -> Replaced | None:
        """Settle ``fresh`` rows and the rows of ``touched`` files with all that they concern.

        ``touched`` have file_key, status and sealed_path; ``fresh`` have ledger.ROW_NAMES. Returns
        None if a file that goes into quarantine has been a sample: then the whole ledger must be
        written again, so that no file of it links a path of the private list to a patient.
        """
        before = self._staged("concerned", self._concerned(touched, fresh))
        after = self._staged("settled", self._after(before, touched, fresh))
        if self._newly_hidden(before, after):
            return None
        old = total(map_batches(_settled(before), self._write(None), SUMS).collect())
        new = total(map_batches(after, self._write(self._generation), SUMS).collect())
        replaced = total(
            map_batches(
                before.select(*ledger.IDENTITY),
                _WriteSuperseded(self._samples.url, self._generation),
                SUMS,
            ).collect()
        )
        settled = self._manifest.settled
        assert settled is not None, "Increment.fits"
        sums = sums_of(settled)
        for what in _STANDING:
            sums[what].subtract(old[what])
            sums[what].update(new[what])
        sums["total"]["sealed"] -= before.where("was_sealed").count()
        for half in sums["digest"]:
            sums["digest"][half] %= 16**16
        rows, gone = sum(new["ledger"].values()), sum(replaced["superseded"].values())
        sums |= {"ledger": new["ledger"], "superseded": replaced["superseded"]}
        added, removed = ledger.exchanged(before, after)
        renewed = settled_of(
            sums, self._source_key, rows=settled.rows + rows, superseded=settled.superseded + gone
        )
        return Replaced(sums, renewed, added, removed)

    def list_quarantined(self, touched: DataFrame, added: Replaced | None) -> Sums:
        """Write the quarantine anew and stage the private list's rows; return the files' names."""
        manifest, new = self._manifest, added.sums if added else {}
        rows = self._samples.read_ledger(
            self._spark,
            [*manifest.ledger, *new.get("ledger", ())],
            [*manifest.superseded, *new.get("superseded", ())],
        ).where((F.col("outcome") == ledger.QUARANTINED) & F.col("speaks_for_file"))
        paths = touched.select("file_key", "sealed_path")
        known = rows.join(paths, "file_key", "left").select(LISTED_NAMES)
        write = _WriteQuarantine(self._samples.url, self._generation if added else None)
        return total(map_batches(known, write, SUMS).collect())

    # --- the rows that a change concerns ---

    def _concerned(self, touched: DataFrame, fresh: DataFrame) -> DataFrame:
        """Return the stored rows that share pixels, patient or file with a change."""
        changed = touched.where(F.col("status") != ledger.NEW).select("file_key")
        files = {"file_key": KeyFilter.of(changed)}
        of_files = self._staged("offiles", self._found(files))
        pixels = of_files.select("pixel_key").unionByName(fresh.select("pixel_key"))
        images = {"pixel_key": KeyFilter.of(pixels)}
        same = self._staged("samepixels", self._found(images))
        both = of_files.unionByName(same)
        patients = both.select("patient_key").unionByName(fresh.select("patient_key"))
        return self._found(
            images
            | {
                "file_key": KeyFilter.of(both.select("file_key")),
                "patient_key": KeyFilter.of(patients),
            }
        )

    def _found(self, filters: dict[str, KeyFilter]) -> DataFrame:
        names = [(name,) for name in self._manifest.ledger]
        tasks = max(1, min(len(names), 8 * default_parallelism(self._spark)))
        files = self._spark.createDataFrame(names, "name string").repartition(tasks)
        found = map_batches(files, FindRows(self._samples.url, filters), FOUND_SPARK)
        rows = self._samples.standing(self._spark, found, self._manifest.superseded)
        rows = rows.withColumn("was_sealed", F.col("sealed").isNotNull())
        if self._manifest.sealed:
            rows = unsealed(rows, self._pseudonyms)
        here = F.col("source_key") == self._source_key
        return rows.withColumn("present", here & F.coalesce("present", F.lit(False))).withColumn(
            "sealed_path", F.lit(None).cast("string")
        )

    # --- settling them ---

    def _after(self, before: DataFrame, touched: DataFrame, fresh: DataFrame) -> DataFrame:
        """Return the rows ``before`` without what is gone, and the fresh ones, settled."""
        statuses = touched.where(F.col("status") != ledger.NEW).select("file_key", "status")
        known = before.join(statuses, "file_key", "left")
        status = F.coalesce("status", F.lit(""))
        gone = status.isin(ledger.CHANGED, ledger.FORGOTTEN) | (
            (status == ledger.DELETED) & (F.col("outcome") != ledger.SAMPLE)
        )
        present = (
            F.when(status == ledger.DELETED, False)
            .when(status == ledger.UNCHANGED, True)
            .otherwise(F.col("present"))
        )
        rows = known.where(~gone).withColumn("present", present)
        return _settled(rows, fresh)

    def _newly_hidden(self, before: DataFrame, after: DataFrame) -> bool:
        """Return whether a file of the private list has a patient in clear in ``before``."""
        speaks, number = F.col("speaks_for_file"), F.col("frame").alias("number")
        hidden = after.where(
            (F.col("outcome") == ledger.QUARANTINED)
            & (speaks | (F.col("reason") == ledger.CONFLICTING_LABEL))
        ).select(F.col("file_key").alias("key"), number, speaks.alias("speaks"))
        clear = before.where(~F.col("was_sealed") & F.col("patient_key").isNotNull())
        same = (clear["file_key"] == hidden["key"]) & (
            hidden["speaks"] | clear["frame"].eqNullSafe(hidden["number"])
        )
        return bool(clear.join(hidden, same, "left_semi").take(1))

    def _write(self, generation: str | None) -> WriteLedger:
        return WriteLedger(self._samples.url, generation, self._pseudonyms, quarantine=False)


def _settled(found: DataFrame, fresh: DataFrame | None = None) -> DataFrame:
    """Return ``found`` and ``fresh`` rows, settled where their pixels were looked for."""
    again = F.array_contains("hits", "pixel_key")
    rows = found.where(again).select(ledger.ROW_NAMES)
    others = found.where(~again).select(ledger.ROW_NAMES)
    return ledger.settle(rows if fresh is None else rows.unionByName(fresh), others=others)


@dataclass(frozen=True)
class _WriteSuperseded:
    """Writes which rows of the ledger are replaced, in a task, and reports the files."""

    samples: str
    generation: str

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        name = f"superseded/{self.generation}/{uuid.uuid4().hex}.parquet"
        file = File(self.samples, "superseded", name)
        for batch in batches:
            file.add(pa.Table.from_batches([batch]))
        yield reports({"superseded": Counter(file.close())})


@dataclass(frozen=True)
class _WriteQuarantine:
    """Writes the quarantine and stages the private list's rows, in a task."""

    samples: str
    generation: str | None

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        name = f"quarantine/{self.generation}/{uuid.uuid4().hex}.parquet"
        stage = f"staging/listed/part-{uuid.uuid4().hex}.parquet"
        public = File(self.samples, "quarantine", name, self.generation is not None)
        listed = File(self.samples, "listed", stage)
        for batch in batches:
            rows: Any = pa.Table.from_batches([batch])
            public.add(rows.select(["reason", "message"]))
            listed.add(rows)
        yield reports({file.kind: Counter(file.close()) for file in (public, listed)})
