"""Make training shards from samples: split by patient, shuffle, write equal files, commit."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from medspark import ownership, storage
from medspark.errors import RunError, UsageError
from medspark.ingest import ledger
from medspark.ingest.migrate import is_former
from medspark.ingest.sample_set import SampleSet, SamplesManifest, new_generation
from medspark.lock import locked
from medspark.sharding.assignment import assign_splits, leak_check
from medspark.sharding.config import ShardConfig
from medspark.sharding.label_encoding import ClassEncoding, FindingsEncoding
from medspark.sharding.layout import Counts, Layout
from medspark.sharding.near import (
    NEAR_DUPLICATES,
    HashSamples,
    check_library,
    lookalikes,
    tied_patients,
    with_groups,
    write_lookalikes,
)
from medspark.sharding.reshape import PLACED, WRITTEN, ReadSamples, WriteShards, clean_shards
from medspark.shards.manifest import (
    Manifest,
    Shard,
    Split,
    digest_of,
    manifest_version,
    write_manifest,
)
from medspark.shards.schema import SPLITS, PixelFormat
from medspark.spark.cluster import default_parallelism
from medspark.spark.session import task_errors
from medspark.spark.task import map_batches

# Bytes of pixels in an Arrow batch between the JVM and Python. Larger batches are not faster.
_BATCH_BYTES = 8 << 20
_ARROW_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"


def open_samples(config: ShardConfig) -> SamplesManifest:
    """Return the manifest of the sample dataset, after checking both folders.

    Raises UsageError if the dataset is missing or unfinished, ImageHash is needed but not
    installed, the shard folder is not medspark's, or the two folders overlap.
    """
    if config.near_duplicates is not None:
        check_library()
    if not storage.is_folder(config.samples):
        raise UsageError(f"There is no sample folder {config.samples}.")
    samples = SampleSet(config.samples)
    samples.clean_after_kill()
    manifest = samples.manifest()
    if manifest is None:
        raise UsageError(f"{config.samples} holds no samples: jobs/ingest.py has not finished.")
    ownership.apart({"the samples": samples.url}, {"the shards": config.shards})
    ownership.check(config.shards, "shards")
    return manifest


def make_shards(
    spark: SparkSession, config: ShardConfig, manifest: SamplesManifest
) -> dict[str, Any]:
    """Write the training shards and return their description.

    The same samples, seed and settings give the same files, and so the same digest. Raises
    UsageError if the samples cannot be converted to one format, or the train or test split is
    empty.
    """
    ownership.claim(config.shards, "shards")
    with locked(config.shards) as is_held, task_errors():
        clean_shards(config.shards)
        try:
            return _Sharding(spark, config, manifest).run()
        finally:
            if is_held():
                clean_shards(config.shards)


class _Sharding:
    """One run of the sharding job, step by step."""

    def __init__(self, spark: SparkSession, config: ShardConfig, manifest: SamplesManifest) -> None:
        self._spark, self._config, self._source = spark, config, manifest
        self._encoding = FindingsEncoding() if manifest.multi_label else ClassEncoding()
        self._samples = SampleSet(config.samples)
        self._parts = {part.path: (part.bytes, part.sha256) for part in manifest.parts}
        self._generation = new_generation()
        self._replaced = manifest_version(config.shards)

    def run(self) -> dict[str, Any]:
        """Write and commit the shards; return the result document."""
        live, near = self._grouped(self._live())
        classes = self._classes(live)
        pixel_format = self._format(live)
        assigned = assign_splits(
            live, self._encoding.number(classes), self._config.split, seed=self._config.seed
        ).persist()
        try:
            counts = self._counts(assigned, classes)
            leaks = leak_check(assigned) | near
            layout = Layout.of(counts, pixel_format, self._config.shard_bytes)
            written = self._write(assigned, layout, pixel_format)
        finally:
            assigned.unpersist()
        splits = {name: self._split(name, counts[name], layout, written) for name in SPLITS}
        self._commit(splits, classes, pixel_format, leaks)
        return self._result(splits, classes, pixel_format, leaks)

    # --- samples, classes and format ---

    def _live(self) -> DataFrame:
        source = self._source
        rows = self._samples.read_ledger(self._spark, source.ledger, source.superseded)
        live = rows.where(F.col("outcome") == ledger.SAMPLE)
        if is_former(self._source):  # earlier versions store plain site names
            live = live.withColumn("site", F.lit(None).cast("string"))
        if self._config.classes is not None:
            live = self._encoding.kept(live, self._config.classes)
        return live

    def _classes(self, live: DataFrame) -> list[str]:
        labels = [row["label"] for row in live.select("label").distinct().collect()]
        present = sorted(self._encoding.names(labels))
        missing = set(self._config.classes or []) - set(present)
        if missing:
            raise UsageError(f"No sample has the label {sorted(missing)[0]!r} of --classes.")
        if not present:
            raise UsageError(f"{self._config.samples} holds no samples.")
        classes = self._config.classes or present
        self._encoding.check(classes)
        return classes

    def _format(self, live: DataFrame) -> PixelFormat:
        names = ("height", "width", "channels", "bits")
        row = live.agg(
            *[F.min(name).alias(f"min_{name}") for name in names],
            *[F.max(name).alias(f"max_{name}") for name in names],
        ).first()
        assert row is not None
        config = self._config
        height, width = config.size or row["max_height"], config.size or row["max_width"]
        if height > row["min_height"] or width > row["min_width"]:
            raise UsageError(
                f"The smallest sample is {row['min_height']} x {row['min_width']} pixels: "
                f"--size cannot be {height}, since samples are never enlarged."
            )
        bits = config.bits or row["min_bits"]
        if bits > row["min_bits"]:
            raise UsageError(f"The samples have {row['min_bits']} bits; --bits cannot be {bits}.")
        channels = row["max_channels"] if config.channels == "auto" else int(config.channels)
        return PixelFormat(height, width, channels, bits)

    # --- groups and counts ---

    def _grouped(self, live: DataFrame) -> tuple[DataFrame, dict[str, int]]:
        """Return the samples with the ``group`` of their patient, and counts of near duplicates.

        All patients of a group go to one split. Each patient is a separate group, named by the
        patient key, unless one of the images looks like another patient's.
        """
        bits = self._config.near_duplicates
        table = storage.join(storage.normalise(self._config.shards), NEAR_DUPLICATES)
        if bits is None:
            storage.remove_file(table)
            return live.withColumn("group", F.col("patient_key")), {}
        found = lookalikes(live, HashSamples(self._samples.url, self._parts), bits=bits)
        write_lookalikes(found, table)
        tied = tied_patients(found)
        counts = {"near_duplicates": len(found), "patients_kept_together": len(tied)}
        return with_groups(live, tied), counts

    def _counts(self, assigned: DataFrame, classes: list[str]) -> dict[str, Counts]:
        images: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        sites: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for row in assigned.groupBy("target", "number", "site").count().collect():
            images[row["target"]][row["number"]] += row["count"]
            if row["site"] is not None:
                sites[row["target"]][row["site"]] += row["count"]
        patients = {
            row["target"]: row["patients"]
            for row in assigned.groupBy("target")
            .agg(F.countDistinct("patient_key").alias("patients"))
            .collect()
        }
        counts = {
            split: Counts(
                sum(images[split].values()),
                self._encoding.by_class(images[split], len(classes)),
                patients.get(split, 0),
                dict(sorted(sites[split].items())),
            )
            for split in SPLITS
        }
        for split in ("train", "test"):
            if counts[split].rows == 0:
                raise UsageError(
                    f"The {split} split is empty: there are too few patients; change split.val, "
                    "split.test or seed."
                )
        return counts

    # --- shards and manifest ---

    def _write(
        self, assigned: DataFrame, layout: Layout, pixel_format: PixelFormat
    ) -> dict[int, Shard]:
        bucket = F.lit(None)
        for split in layout.splits:
            if split.rows:
                number = layout.number(split, F.col("position"))
                bucket = F.when(F.col("target") == split.name, F.floor(number)).otherwise(bucket)
        placed = assigned.withColumn("bucket", bucket.cast("int")).select(
            "bucket", "position", "sample_key", "patient_key", "site", "number", "part", "row"
        )
        parts = self._parts
        cores = default_parallelism(self._spark)
        read = ReadSamples(self._samples.url, parts, pixel_format)
        write = WriteShards(
            storage.normalise(self._config.shards),
            self._generation,
            layout,
            pixel_format,
            self._config.rows_per_group,
        )
        rows = max(1, min(4096, _BATCH_BYTES // pixel_format.nbytes))
        before = self._spark.conf.get(_ARROW_ROWS)
        self._spark.conf.set(_ARROW_ROWS, str(rows))
        try:
            by_part = placed.repartition(max(1, min(len(parts), 8 * cores)), "part")
            pixels = map_batches(by_part.sortWithinPartitions("part", "row"), read, PLACED)
            by_shard = pixels.repartition(layout.shards, "bucket")
            sorted_rows = by_shard.sortWithinPartitions("bucket", "position")
            written = map_batches(sorted_rows, write, WRITTEN).collect()
        finally:
            self._spark.conf.set(_ARROW_ROWS, str(before))
        return {
            row["bucket"]: Shard(
                path=row["path"], rows=row["rows"], bytes=row["bytes"], sha256=row["sha256"]
            )
            for row in written
        }

    def _split(self, name: str, counts: Counts, layout: Layout, written: dict[int, Shard]) -> Split:
        shards = tuple(written[bucket] for bucket in layout.buckets(name))
        if sum(shard.rows for shard in shards) != counts.rows:
            raise RunError(f"The {name} shards do not hold all {counts.rows} rows of the split.")
        return Split(
            rows=counts.rows,
            patients=counts.patients,
            class_counts=counts.by_class,
            sites=counts.by_site,
            shards=shards,
        )

    def _commit(
        self,
        splits: dict[str, Split],
        classes: list[str],
        pixel_format: PixelFormat,
        leaks: dict[str, int],
    ) -> None:
        folder = self._config.shards
        source = {
            "digest": self._source.digest,
            "counts": self._source.counts,
            "rendering": self._source.rendering,
            "split": self._config.split.model_dump(),
        }
        write_manifest(
            folder,
            Manifest(
                digest=self._digest(splits),
                generation=self._generation,
                classes=tuple(classes),
                multi_label=self._encoding.multi_label,
                height=pixel_format.height,
                width=pixel_format.width,
                channels=pixel_format.channels,
                bits=pixel_format.bits,
                seed=self._config.seed,
                splits=splits,
                leak_check=leaks,
                source=source,
            ),
            self._replaced,
        )

    def _digest(self, splits: dict[str, Split]) -> str:
        return digest_of(splits, multi_label=self._encoding.multi_label)

    def _result(
        self,
        splits: dict[str, Split],
        classes: list[str],
        pixel_format: PixelFormat,
        leaks: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "shards_folder": str(self._config.shards),
            "digest": self._digest(splits),
            "classes": classes,
            "multi_label": self._encoding.multi_label,
            "pixels": {**vars(pixel_format)},
            "splits": {
                name: split.model_dump(exclude={"shards"}) | {"shards": len(split.shards)}
                for name, split in splits.items()
            },
            "leak_check": leaks,
        }
