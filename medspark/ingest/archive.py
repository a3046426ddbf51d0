"""From an archive to a dataset of samples: list, compare, decode what is new, settle, commit."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark import ownership
from medspark.config import Config
from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, Pseudonyms, load_key
from medspark.images.rendering import Rendering
from medspark.images.resident import ResidentPseudonyms
from medspark.ingest import ledger, npz, storage
from medspark.ingest.decode import OUTCOME_SPARK_SCHEMA, Decoding
from medspark.ingest.discover import discover, from_inventory
from medspark.ingest.labels import (
    BETWEEN_FINDINGS,
    LabelConfig,
    LabelTable,
    check_length,
    coded_attribute,
    from_folders,
    has_class_folders,
    match_key,
)
from medspark.ingest.labels import (
    SPARK_SCHEMA as LABEL_SCHEMA,
)
from medspark.ingest.limits import ArchiveLimits
from medspark.ingest.parts import Part
from medspark.ingest.session import task_errors
from medspark.ingest.tally import SUMS, Sums, WriteLedger, digest_of, total
from medspark.ingest.task import map_batches
from medspark.ingest.write import SampleSet, SamplesManifest, new_generation
from medspark.lock import locked

_LOGGER = logging.getLogger(__name__)

_DICOM = "dicom:"
_FILES_PER_TASK = 1000
_ANNOTATED = (
    "path string, size bigint, label string, patient_key string, split string, site string, "
    "conflict boolean, file_key string, fingerprint string"
)


class IngestConfig(Config):
    """What is read, what it means, and where it goes."""

    source: str = Field(description="folder of the archive: a path, or a URL (s3a, abfss, hdfs)")
    samples: str = Field(description="folder of the sample dataset, made or added to")
    labels: str | None = Field(
        None,
        description="CSV, TSV or Parquet table of labels, or dicom:KEYWORD for a coded attribute; "
        "by default a file's folder is its label",
    )
    inventory: str | None = Field(
        None, description="table of path, size, modified to use in place of listing the source"
    )
    image_size: int | None = Field(
        None, ge=4, le=8192, description="height and width of the samples, in pixels"
    )
    label_table: LabelConfig = Field(default_factory=LabelConfig)
    rendering: Rendering = Field(default_factory=Rendering)
    limits: ArchiveLimits = Field(default_factory=ArchiveLimits)
    privacy: Privacy = Field(default_factory=Privacy)
    guarded: bool = Field(
        True, description="decode in a child process, so that no file can end or stall a worker"
    )
    dry_run: bool = Field(False, description="say what would happen, and change nothing")

    @property
    def effective_rendering(self) -> Rendering:
        """The rendering, with the image size where that was given."""
        if self.image_size is None:
            return self.rendering
        return self.rendering.model_copy(update={"size": self.image_size})

    @property
    def label_attribute(self) -> str | None:
        """The kept DICOM attribute that labels come from, if they do."""
        labels = self.labels or ""
        return coded_attribute(labels[len(_DICOM) :]) if labels.startswith(_DICOM) else None


@dataclass(frozen=True)
class Archive:
    """A source that was looked at, with what is needed to ingest it. Nothing has been written."""

    config: IngestConfig
    source: str
    samples: SampleSet
    table: LabelTable | None
    multi_label: bool  # whether a sample's label is any number of findings
    pseudonyms: Pseudonyms

    @property
    def source_key(self) -> str:
        """The name of the source in the ledger."""
        return self.pseudonyms.name("source", self.source)


def open_archive(config: IngestConfig) -> Archive:
    """Check everything that can be checked without Spark. Raises UsageError."""
    source, samples = storage.normalise(config.source), SampleSet(config.samples)
    if npz.is_npz(source):
        npz.list_images(source, config.limits)
    elif not storage.is_folder(source):
        raise UsageError(f"There is no source folder {config.source}.")
    ownership.apart({"the source": source}, {"the samples": samples.url})
    ownership.check(samples.url, "samples")
    table = None
    if config.labels is None:
        by_folder = config.inventory is None and not npz.is_npz(source)
        if by_folder and not has_class_folders(source):
            raise UsageError(
                f"{source} has no folder per class: give a table of labels with --labels."
            )
    elif config.label_attribute is None and npz.is_npz(source):
        raise UsageError(f"{source} carries its own labels: --labels has no meaning here.")
    elif config.label_attribute is None:
        table = LabelTable(
            config.labels, source, config.label_table, follow_links=config.limits.follow_links
        )
    several = config.label_table.several
    if table is None and several:
        raise UsageError("label_table is about a table of labels: give it with --labels.")
    manifest = samples.manifest()
    key = load_key(config.privacy, dataset=samples.url, new=manifest is None)
    there = config.privacy.executor_key_file
    pseudonyms = ResidentPseudonyms(key, file=there) if there else Pseudonyms(key)
    multi_label = several or (npz.is_npz(source) and npz.has_findings(source, config.limits))
    archive = Archive(config, source, samples, table, multi_label, pseudonyms)
    if manifest:
        _check_same(manifest, archive)
    return archive


def _check_same(manifest: SamplesManifest, archive: Archive) -> None:
    config, pseudonyms = archive.config, archive.pseudonyms
    if manifest.key_check != _key_check(pseudonyms):
        raise UsageError(
            f"{config.samples} was made with another pseudonym key; name that one with "
            "--privacy.key_file, or write to another folder."
        )
    if manifest.multi_label != archive.multi_label:
        has = "any number of labels" if manifest.multi_label else "one label"
        raise UsageError(
            f"An image of {config.samples} has {has}, and one of {config.source} has not "
            "(label_table decides); write to another folder."
        )
    rendering = config.effective_rendering.model_dump(mode="json")
    for key, value in rendering.items():
        if manifest.rendering.get(key) != value:
            raise UsageError(
                f"{config.samples} was rendered with {key} {manifest.rendering.get(key)}, not "
                f"{value}; write to another folder."
            )


def _key_check(pseudonyms: Pseudonyms) -> str:
    return pseudonyms.check


def ingest(spark: SparkSession, archive: Archive) -> dict[str, Any]:
    """Add what is new in the archive to its dataset, and return what became of every file.

    ``files_seen = samples + duplicates + quarantined`` counts files, each once; ``frames`` counts
    samples, of which a multi-frame file gives several. Raises UsageError where another ingest
    has the dataset.
    """
    ownership.claim(archive.samples.url, "samples")
    with locked(archive.samples.url), task_errors():
        archive.samples.clean()
        try:
            result = _Ingest(spark, archive).run()
            archive.samples.clean_newest()
            return result
        except Exception:  # whatever it was, a disk that is full because of us should not stay so
            archive.samples.clean()
            raise
        finally:
            archive.samples.clean_staging()


class _Ingest:
    """One run, step by step."""

    def __init__(self, spark: SparkSession, archive: Archive) -> None:
        self._spark, self._archive, self._samples = spark, archive, archive.samples
        self._manifest = archive.samples.manifest()
        self._generation = new_generation()

    def run(self) -> dict[str, Any]:
        before = self._ledger()
        here = before.where(F.col("source_key") == self._archive.source_key)
        files = self._staged("files", ledger.compare(self._annotated(), here))
        counts = self._changes(files)
        gone = counts.pop(ledger.DELETED) + counts[ledger.FORGOTTEN]
        forgotten = counts.pop(ledger.FORGOTTEN)
        todo = counts[ledger.NEW] + counts[ledger.CHANGED]
        result = {"files_seen": todo + counts[ledger.UNCHANGED], **counts, "deleted": gone}
        if self._archive.config.dry_run:
            return result | {"dry_run": True}
        changes = bool(todo or forgotten or self._manifest is None)
        decoded = self._decoded(files, todo) if changes else None
        sums = self._settled(before, files, decoded)
        result |= _outcomes(sums) | {"labels": self._by_label(sums["label"])}
        result |= {"added": 0, "removed": 0}
        if decoded is not None:
            after = read_ledger(self._spark, self._samples, list(sums["ledger"]))
            result |= self._exchanged(before, after, sums)
            self._commit(tuple(self._parts(after, decoded)), sums, result)
        return result | {"samples_folder": self._samples.url}

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
        )
        rows = table.collect()
        if not self._archive.multi_label:
            check_length(max((row["longest"] or 0 for row in rows), default=0))
        if self._archive.table and rows and not sum(row["labelled"] for row in rows):
            raise self._archive.table.no_match()
        found = {row["status"]: row["count"] for row in rows}
        names = (ledger.NEW, ledger.CHANGED, ledger.UNCHANGED, ledger.DELETED, ledger.FORGOTTEN)
        return {name: found.get(name, 0) for name in names}

    # --- what there is ---

    def _ledger(self) -> DataFrame:
        files = self._manifest.ledger if self._manifest else ()
        return read_ledger(self._spark, self._samples, files)

    def _annotated(self) -> DataFrame:
        """Return the files of the archive with label, patient, split and site, and their keys."""
        config, archive = self._archive.config, self._archive
        by_folder = config.labels is None and not npz.is_npz(archive.source)
        if npz.is_npz(archive.source):
            images = npz.list_images(archive.source, config.limits)
            listed = self._spark.createDataFrame(images)
        elif config.inventory:
            listed = from_inventory(self._spark, config.inventory, archive.source)
        else:
            listed = discover(
                self._spark,
                archive.source,
                exclude=self._side_files(),
                follow_links=config.limits.follow_links,
            )
        if archive.table is not None:
            listed = self._with_table(listed)
        annotate = _Annotate(archive.source, archive.pseudonyms, by_folder=by_folder)
        return map_batches(listed, annotate, _ANNOTATED)

    def _with_table(self, listed: DataFrame) -> DataFrame:
        table, path = self._archive.table, self._samples.path("staging", "labels.parquet")
        assert table is not None
        storage.make_folder(self._samples.path("staging"))
        table.write(path, self._archive.pseudonyms)
        rows = self._spark.read.schema(LABEL_SCHEMA).parquet(storage.for_spark(path))
        labels = (
            rows.where(F.col("match").isNotNull())
            .groupBy("match")
            .agg(
                F.min("label").alias("label"),
                F.min("patient_key").alias("patient_key"),
                # A file that is listed under two splits is not to be trained on.
                F.min_by("split", ledger.hint_rank()).alias("split"),
                F.min("site").alias("site"),
                (F.min("label") != F.max("label")).alias("conflict"),
            )
        )
        match = self._archive.config.label_table.match
        key = F.udf(lambda path: match_key(path, match), "string")
        matched = F.col("path") if match == "path" else key("path")
        joined = listed.withColumn("match", matched).join(labels, "match", "left")
        return joined.drop("match")

    def _side_files(self) -> frozenset[str]:
        """Return files below the source that are not part of it: the table of labels."""
        labels = self._archive.config.labels
        if labels is None or self._archive.table is None:
            return frozenset()
        prefix = self._archive.source + "/"
        table = storage.normalise(labels)
        return frozenset([table.removeprefix(prefix)]) if table.startswith(prefix) else frozenset()

    # --- what is done ---

    def _decoded(self, files: DataFrame, count: int) -> DataFrame:
        """Decode what is new or changed; what comes back is from attempts that succeeded."""
        archive, config = self._archive, self._archive.config
        decoding = Decoding(
            source=archive.source,
            source_key=archive.source_key,
            samples=self._samples.url,
            generation=self._generation,
            rendering=config.effective_rendering,
            limits=config.limits,
            privacy=config.privacy,
            pseudonyms=archive.pseudonyms,
            label_attribute=config.label_attribute,
            guarded=config.guarded,
        )
        todo = files.where(F.col("status").isin(ledger.NEW, ledger.CHANGED))
        spread = todo.repartition(max(1, self._tasks(count)))
        return self._staged("outcomes", map_batches(spread, decoding, OUTCOME_SPARK_SCHEMA))

    def _tasks(self, files: int) -> int:
        # Some per core, so that one with slow files does not keep the others waiting.
        cores = self._spark.sparkContext.defaultParallelism
        return min(files, max(4 * cores, math.ceil(files / _FILES_PER_TASK)))

    def _settled(self, before: DataFrame, files: DataFrame, decoded: DataFrame | None) -> Sums:
        """Write the ledger to come, if anything was decoded, and return what it adds up to."""
        here = F.col("source_key") == self._archive.source_key
        rows = ledger.remaining(before.where(here), files)
        rows = rows.unionByName(self._with_paths(before.where(~here)))
        if decoded is not None:
            # What was just decoded is no sample yet: an older one with equal pixels has precedence.
            sample = F.col("outcome") == ledger.SAMPLE
            first = F.when(sample, "candidate").otherwise(F.col("outcome"))
            fresh = decoded.where(F.col("part_sha256").isNull()).withColumn("outcome", first)
            rows = rows.unionByName(
                fresh.withColumn("present", F.lit(True)).select(ledger.ROW_NAMES)
            )
        write = WriteLedger(self._samples.url, self._generation if decoded is not None else None)
        return total(map_batches(ledger.settle(rows), write, SUMS).collect())

    def _with_paths(self, elsewhere: DataFrame) -> DataFrame:
        """Return rows of other archives with the paths of the files that are in quarantine."""
        absent = elsewhere.withColumn("present", F.lit(False))
        if not (self._manifest and self._manifest.quarantine):
            return absent.withColumn("path", F.lit(None).cast("string"))
        paths = [storage.for_spark(self._samples.path(path)) for path in self._manifest.quarantine]
        known = self._spark.read.parquet(*paths).select("source_key", "file_key", "path")
        return absent.join(known, ["source_key", "file_key"], "left")

    def _by_label(self, images: Counter[str]) -> dict[str, int]:
        """Return the samples that have each label; of several findings a sample has each counts."""
        if not self._archive.multi_label:
            return dict(sorted(images.items()))
        found: Counter[str] = Counter()
        for label, count in images.items():
            found.update(dict.fromkeys(label.split(BETWEEN_FINDINGS), count))
        found[self._archive.config.label_table.no_finding] = found.pop("", 0)
        return dict(sorted(found.items()))

    # --- what is kept ---

    def _commit(self, parts: tuple[Part, ...], sums: Sums, result: dict[str, Any]) -> None:
        self._samples.commit(
            SamplesManifest(
                generation=self._generation,
                previous=self._manifest.generation if self._manifest else None,
                digest=digest_of(sums),
                counts={k: v for k, v in result.items() if isinstance(v, int)},
                rendering=self._archive.config.effective_rendering.model_dump(mode="json"),
                multi_label=self._archive.multi_label,
                key_check=_key_check(self._archive.pseudonyms),
                parts=parts,
                ledger=tuple(sorted(sums["ledger"])),
                quarantine=tuple(sorted(sums["quarantine"])),
            )
        )

    def _parts(self, after: DataFrame, decoded: DataFrame) -> Iterator[Part]:
        """Yield every new part, and every old one of which a row is still of use."""
        if self._manifest:
            used = {row["part"] for row in after.select("part").distinct().collect()}
            yield from (part for part in self._manifest.parts if part.path in used)
        rows = decoded.where(F.col("part_sha256").isNotNull()).collect()
        for row in sorted(rows, key=lambda row: str(row["part"])):
            yield Part(
                path=row["part"],
                rows=row["part_rows"],
                bytes=row["part_bytes"],
                sha256=row["part_sha256"],
            )

    def _staged(self, name: str, rows: DataFrame) -> DataFrame:
        """Write rows down and return them read back: whatever made them is never run twice."""
        path = storage.for_spark(self._samples.path("staging", name))
        schema = rows.schema
        rows.write.parquet(path)
        return self._spark.read.schema(schema).parquet(path)


def _outcomes(sums: Sums) -> dict[str, Any]:
    """Return what the ledger adds up to, as users are told it."""
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


class _Annotate:
    """Adds a file's key and fingerprint, and the label of its folder where asked to."""

    def __init__(self, source: str, pseudonyms: Pseudonyms, *, by_folder: bool) -> None:
        self._source, self._pseudonyms, self._by_folder = source, pseudonyms, by_folder

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [self._annotated(row) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=_ANNOTATED_ARROW)

    def _annotated(self, row: dict[str, Any]) -> dict[str, Any]:
        path = row["path"]
        label, split = row.get("label"), row.get("split")
        if self._by_folder:
            label, split = from_folders(path)
        known = {
            "label": label,
            "patient_key": row.get("patient_key"),
            "split": split,
            "site": row.get("site"),
            "conflict": bool(row.get("conflict")),
        }
        state = [row["size"], row["modified"], *known.values()]
        return known | {
            "path": path,
            "size": row["size"],
            "file_key": self._pseudonyms.name("file", f"{self._source}/{path}"),
            "fingerprint": self._pseudonyms.name("fingerprint", repr(state)),
        }


_ANNOTATED_ARROW = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("label", pa.string()),
        ("patient_key", pa.string()),
        ("split", pa.string()),
        ("site", pa.string()),
        ("conflict", pa.bool_()),
        ("file_key", pa.string()),
        ("fingerprint", pa.string()),
    ]
)


def read_ledger(spark: SparkSession, samples: SampleSet, files: Sequence[str]) -> DataFrame:
    """Return the ledger that lies in ``files`` of a dataset, of which there may be none."""
    if not files:
        return spark.createDataFrame(ledger.SCHEMA.empty_table())
    paths = [storage.for_spark(samples.path(path)) for path in files]
    return spark.read.schema(ledger.SPARK_SCHEMA).parquet(*paths)
