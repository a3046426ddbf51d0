"""Ingest an archive into a sample set: list, compare, decode new files, settle, commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark import ownership
from medspark.ingest import ledger
from medspark.ingest.archive import Archive
from medspark.ingest.decode_task import OUTCOME_SPARK_SCHEMA, DecodeFiles
from medspark.ingest.increment import Increment, settled_of, sums_of
from medspark.ingest.labels import BETWEEN_FINDINGS, check_length
from medspark.ingest.listing import annotated, check_folders
from medspark.ingest.migrate import Migration, former_paths, is_former
from medspark.ingest.parts import Part
from medspark.ingest.quarantine import Row, staged_rows
from medspark.ingest.reading import ArchiveReader
from medspark.ingest.sample_set import SamplesManifest, Settled, new_generation
from medspark.ingest.sealing import unsealed
from medspark.ingest.tally import SUMS, Sums, WriteLedger, digest_of, total
from medspark.lock import locked
from medspark.spark.session import task_errors
from medspark.spark.tables import staged
from medspark.spark.task import map_batches, tasks_for


def ingest(spark: SparkSession, archive: Archive) -> dict[str, Any]:
    """Add the new files of the archive to its dataset, and return counts of all outcomes.

    ``files_seen = samples + duplicates + quarantined`` counts each file once. ``frames`` counts
    samples; a multi-frame file gives several. Raises UsageError if another ingest holds the
    dataset.
    """
    ownership.claim(archive.samples.url, "samples")
    with locked(archive.samples.url) as is_held, task_errors():
        archive.samples.clean()
        try:
            work = _Ingest(spark, archive)
            result = work.run()
            if work.migration is None:
                archive.samples.clean_newest()
            elif not archive.config.dry_run:
                archive.samples.clean()
            return result
        except Exception:  # free the disk space, whatever the error was
            if is_held():  # what lies there now may be another job's
                archive.samples.clean()
            raise
        finally:
            if is_held():
                archive.samples.clean_staging()


class _Ingest:
    """One ingest, step by step."""

    def __init__(self, spark: SparkSession, archive: Archive) -> None:
        self._spark, self._archive, self._samples = spark, archive, archive.samples
        self._manifest = archive.samples.manifest()
        self._generation = new_generation()
        # Files of an earlier version hold plain names and digests, so they are rewritten.
        self.migration = (
            Migration(self._generation, archive.pseudonyms, archive.config.privacy)
            if is_former(self._manifest)
            else None
        )

    def run(self) -> dict[str, Any]:
        """Run the ingest and return its result document."""
        before = self._ledger()
        quickly = self._can_increment(0)
        partly = self._archive.config.inventory_of == "changes"
        files = self._changed(before) if quickly else self._compared(before)
        files = self._staged("files", files)
        counts = self._changes(files)
        gone = counts.pop(ledger.DELETED) + counts[ledger.FORGOTTEN]
        forgotten, touched = counts.pop(ledger.FORGOTTEN), counts.pop("touched")
        todo = counts[ledger.NEW] + counts[ledger.CHANGED]
        result = {"files_seen": todo + counts[ledger.UNCHANGED], **counts, "deleted": gone}
        if self._archive.config.dry_run:
            return result | {"dry_run": True}
        if self._can_increment(touched):
            decoded = self._decoded(files, todo) if touched else None
            sums = self._incremented(files, decoded, result)
        else:
            changes = bool(todo or forgotten or self._manifest is None or self.migration)
            decoded, sums = self._decoded(files, todo) if changes else None, None
        if sums is None:
            if quickly:  # now all that is known of the untouched files is needed, too
                files = self._compared(before)
            sums = self._settled_anew(before, files, decoded, result)
        listed = self._archive.quarantined.renewed(
            self._listed(sums),
            known=former_paths(self._samples, self._manifest),
            completed=self._listed_anew if quickly and not partly else None,
        )
        return result | {"quarantine_file": listed, "samples_folder": self._samples.url}

    def _listed(self, sums: Sums) -> Iterator[Row]:
        """Return the rows of the private list that tasks staged."""
        archive = self._archive
        return staged_rows(
            self._samples, sums["listed"], source=archive.source, pseudonyms=archive.pseudonyms
        )

    def _listed_anew(self) -> Iterator[Row]:
        """Return the rows of the private list, after a listing of the archive, with all paths."""
        self._manifest = self._samples.manifest()
        before = self._ledger()
        return self._listed(self._settled(before, self._compared(before), None))

    def _compared(self, before: DataFrame, listed: DataFrame | None = None) -> DataFrame:
        """Return the listed files and those of the ledger ``before``, with their status."""
        if listed is None:
            listed = annotated(self._spark, self._archive)
        of_source = before.where(F.col("source_key") == self._archive.source_key)
        all_files = self._archive.config.inventory_of == "all"
        return ledger.compare(listed, of_source, all_files=all_files)

    def _changed(self, before: DataFrame) -> DataFrame:
        """Return the compared files, but of an untouched file only what is counted.

        An inventory of changes is looked up in the ledger, and ``before`` is not read.
        """
        listed = None
        if self._archive.config.inventory_of == "changes":
            listed = self._staged("changes", annotated(self._spark, self._archive))
            known = self._increment().known(listed)
            before = known.join(listed.select("file_key"), "file_key", "left_semi")
        files = self._compared(before, listed)
        counted = ("file_key", "label", "status", "touched")
        others = [name for name in files.columns if name not in counted]
        return files.select(
            *counted, *[F.when(F.col("touched"), F.col(n)).alias(n) for n in others]
        )

    def _increment(self) -> Increment:
        assert self._manifest is not None, "Increment.fits"
        return Increment(
            self._spark, self._samples, self._manifest, generation=self._generation,
            source_key=self._archive.source_key, pseudonyms=self._archive.pseudonyms,
            staged=self._staged,
        )  # fmt: skip

    def _can_increment(self, touched: int) -> bool:
        """Return whether to settle only what ``touched`` files concern."""
        manifest, archive = self._manifest, self._archive
        fits = Increment.fits(manifest, archive.source_key, touched=touched)
        # A lost private list is made again from the listing, which tells all paths.
        return fits and (
            not (manifest and manifest.quarantine) or archive.quarantined.path.exists()
        )

    def _incremented(
        self, files: DataFrame, decoded: DataFrame | None, result: dict[str, Any]
    ) -> Sums | None:
        """Settle what changed, and commit; return the sums, or None if that is not enough."""
        manifest = self._manifest
        assert manifest is not None, "Increment.fits"
        assert manifest.settled is not None, "Increment.fits"
        increment = self._increment()
        touched = files.where(F.col("touched"))
        replaced = None
        if decoded is not None:
            replaced = increment.settle(touched, self._fresh(decoded))
            if replaced is None:
                return None
        sums = replaced.sums if replaced else sums_of(manifest.settled)
        sums |= increment.list_quarantined(touched, replaced)
        self._report(result, sums)
        if replaced is not None and decoded is not None:
            result |= {"added": replaced.added, "removed": replaced.removed}
            parts = (*manifest.parts, *self._new_parts(decoded))
            sums["ledger"].update(manifest.ledger)
            sums["superseded"].update(manifest.superseded)
            self._commit(parts, sums, result, replaced.settled)
        return sums

    def _settled_anew(
        self, before: DataFrame, files: DataFrame, decoded: DataFrame | None, result: dict[str, Any]
    ) -> Sums:
        """Settle the whole ledger and, if anything was decoded, commit; return the sums."""
        sums = self._settled(before, files, decoded)
        self._report(result, sums)
        if decoded is not None:
            after = self._opened(list(sums["ledger"]), (), sums["total"]["sealed"])
            result |= self._exchanged(before, after, sums)
            rows = sum(sums["ledger"].values())
            settled = settled_of(sums, self._archive.source_key, rows=rows)
            self._commit(tuple(self._parts(after, decoded)), sums, result, settled)
        return sums

    def _report(self, result: dict[str, Any], sums: Sums) -> None:
        result |= _outcomes(sums) | {"labels": self._by_label(sums["label"])}
        result |= {"added": 0, "removed": 0}
        if self._archive.config.inventory_of == "changes":
            seen = sum(sums["outcome"].values())
            old = seen - result["new"] - result["changed"]
            result |= {"files_seen": seen, "unchanged": old, "deleted": 0}

    def _exchanged(self, before: DataFrame, after: DataFrame, sums: Sums) -> dict[str, int]:
        added, removed = (
            ledger.exchanged(before, after) if self._manifest else (sums["total"]["frames"], 0)
        )
        return {"added": added, "removed": removed}

    def _changes(self, files: DataFrame) -> dict[str, int]:
        table = files.groupBy("status").agg(
            F.count("*").alias("count"),
            F.count("label").alias("labelled"),
            F.max(F.length("label")).alias("longest"),
            F.count(F.when(F.col("touched"), 1)).alias("touched"),
        )
        rows = {row["status"]: row for row in table.collect()}
        if not self._archive.multi_label:
            check_length(max((row["longest"] or 0 for row in rows.values()), default=0))
        if self._archive.table and rows and not sum(row["labelled"] for row in rows.values()):
            raise self._archive.table.no_match()
        if self._archive.by_folder:
            labels = files.where(F.col("label").isNotNull()).select("label")
            check_folders(self._archive, labels.distinct().count())
        counts = {status: row["count"] for status, row in rows.items()}
        names = (ledger.NEW, ledger.CHANGED, ledger.UNCHANGED, ledger.DELETED, ledger.FORGOTTEN)
        touched = sum(row["touched"] for row in rows.values())
        return {name: counts.get(name, 0) for name in names} | {"touched": touched}

    # --- the ledger of earlier ingests ---

    def _ledger(self) -> DataFrame:
        if self._manifest is None:
            return self._opened((), (), 0)
        manifest = self._manifest
        rows = self._opened(manifest.ledger, manifest.superseded, manifest.sealed)
        return self.migration.ledger(rows) if self.migration else rows

    def _opened(self, files: Sequence[str], superseded: Sequence[str], sealed: int) -> DataFrame:
        rows = self._samples.read_ledger(self._spark, files, superseded)
        return unsealed(rows, self._archive.pseudonyms) if sealed else rows

    # --- decoding and settling ---

    def _decoded(self, files: DataFrame, count: int) -> DataFrame:
        """Decode new and changed files; return the outcomes of the successful task attempts."""
        archive, config = self._archive, self._archive.config
        decoding = DecodeFiles(
            ArchiveReader(
                source=archive.source,
                run=self._generation,
                rendering=config.effective_rendering,
                limits=config.limits,
                privacy=config.privacy,
                pseudonyms=archive.pseudonyms,
                guarded=config.guarded,
            ),
            source_key=archive.source_key,
            samples=self._samples.url,
            generation=self._generation,
            label_attribute=config.label_attribute,
        )
        todo = files.where(F.col("status").isin(ledger.NEW, ledger.CHANGED))
        spread = todo.repartition(tasks_for(self._spark, count))
        return self._staged("outcomes", map_batches(spread, decoding, OUTCOME_SPARK_SCHEMA))

    def _settled(self, before: DataFrame, files: DataFrame, decoded: DataFrame | None) -> Sums:
        """Write the new ledger, if anything was decoded, and return its sums."""
        of_source = F.col("source_key") == self._archive.source_key
        rows = ledger.remaining(before.where(of_source), files)
        elsewhere = (
            before.where(~of_source)
            .withColumn("present", F.lit(False))
            .withColumn("sealed_path", F.lit(None).cast("string"))
        )
        rows = rows.unionByName(elsewhere.select(ledger.ROW_NAMES))
        if decoded is not None:
            rows = rows.unionByName(self._fresh(decoded))
        generation = self._generation if decoded is not None else None
        write = WriteLedger(self._samples.url, generation, self._archive.pseudonyms)
        return total(map_batches(ledger.settle(rows), write, SUMS).collect())

    @staticmethod
    def _fresh(decoded: DataFrame) -> DataFrame:
        """Return the rows of decoded files; an older sample with equal pixels wins over them."""
        sample = F.col("outcome") == ledger.SAMPLE
        first = F.when(sample, "candidate").otherwise(F.col("outcome"))
        fresh = decoded.where(F.col("part_sha256").isNull()).withColumn("outcome", first)
        return fresh.withColumn("present", F.lit(True)).select(ledger.ROW_NAMES)

    def _by_label(self, images: Counter[str]) -> dict[str, int]:
        """Return the number of samples per label; a sample counts for each of its findings."""
        if not self._archive.multi_label:
            return dict(sorted(images.items()))
        counts: Counter[str] = Counter()
        for label, count in images.items():
            counts.update(dict.fromkeys(label.split(BETWEEN_FINDINGS), count))
        counts[self._archive.config.label_table.no_finding] = counts.pop("", 0)
        return dict(sorted(counts.items()))

    # --- commit ---

    def _commit(
        self, parts: tuple[Part, ...], sums: Sums, result: dict[str, Any], settled: Settled
    ) -> None:
        previous = self._manifest
        kept = {*sums["ledger"], *sums["quarantine"], *sums["superseded"]}
        stays = previous is not None and self.migration is None
        retired = previous.named() - kept if previous and stays else ()
        self._samples.commit(
            SamplesManifest(
                generation=self._generation,
                previous=previous.generation if previous and not self.migration else None,
                digest=digest_of(sums),
                counts={k: v for k, v in result.items() if isinstance(v, int)},
                rendering=self._archive.config.effective_rendering.model_dump(mode="json"),
                multi_label=self._archive.multi_label,
                key_check=self._archive.pseudonyms.check,
                parts=parts,
                ledger=tuple(sorted(sums["ledger"])),
                quarantine=tuple(sorted(sums["quarantine"])),
                sealed=sums["total"]["sealed"],
                superseded=tuple(sorted(sums["superseded"])),
                retired=tuple(sorted(retired)),
                settled=settled,
            )
        )

    def _parts(self, after: DataFrame, decoded: DataFrame) -> Iterator[Part]:
        """Yield every new part, and every old part that the new ledger still uses."""
        if self._manifest:
            used = {row["part"] for row in after.select("part").distinct().collect()}
            yield from (part for part in self._earlier_parts() if part.path in used)
        yield from self._new_parts(decoded)

    @staticmethod
    def _new_parts(decoded: DataFrame) -> Iterator[Part]:
        rows = decoded.where(F.col("part_sha256").isNotNull()).collect()
        for row in sorted(rows, key=lambda row: str(row["part"])):
            yield Part(
                path=row["part"],
                rows=row["part_rows"],
                bytes=row["part_bytes"],
                sha256=row["part_sha256"],
            )

    def _earlier_parts(self) -> Sequence[Part]:
        assert self._manifest is not None
        parts = self._manifest.parts
        if self.migration is None or not parts:
            return parts
        renewed = self.migration.parts(self._spark, self._samples, parts)
        rows = self._staged("parts", renewed).collect()
        return [Part.model_validate(row.asDict()) for row in rows]

    def _staged(self, name: str, rows: DataFrame) -> DataFrame:
        return staged(rows, self._samples.path("staging", name))


def _outcomes(sums: Sums) -> dict[str, Any]:
    """Return the sums of the ledger under their names in the result document."""
    outcome, totals = sums["outcome"], sums["total"]
    return {
        "samples": outcome[ledger.SAMPLE],
        "duplicates": outcome[ledger.DUPLICATE],
        "quarantined": outcome[ledger.QUARANTINED],
        "quarantine_reasons": dict(sorted(sums["reason"].items())),
        "frames": totals["frames"],
        "patients": totals["patients"],
        "bytes_seen": totals["bytes"],
        "cross_patient_duplicates": totals["shared"],
    }
