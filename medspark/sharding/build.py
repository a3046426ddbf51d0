"""From samples to training shards: split by patient, shuffle, write equal files, commit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from medspark import ownership
from medspark.config import Bits, Config
from medspark.errors import RunError, UsageError
from medspark.ingest import ledger
from medspark.ingest.migrate import is_former
from medspark.ingest.write import SampleSet, SamplesManifest, new_generation
from medspark.lock import locked
from medspark.sharding.layout import Counts, Layout
from medspark.sharding.near import (
    HashSamples,
    Lookalike,
    check_library,
    lookalikes,
    tied_patients,
)
from medspark.sharding.numbering import Classes, Findings
from medspark.sharding.reshape import PLACED, WRITTEN, ReadSamples, WriteShards, clean_shards
from medspark.shards.manifest import Manifest, Shard, Split, digest_of, write_manifest
from medspark.shards.schema import SPLITS, PixelFormat
from medspark.shards.split import SplitConfig, patient_split
from medspark.spark import storage
from medspark.spark.session import task_errors
from medspark.spark.task import map_batches

# Pixels in an Arrow batch between the JVM and Python; more does not go faster.
_BATCH_BYTES = 8 << 20
# Beside the shards, where it is asked for: the samples that look like another patient's.
NEAR_DUPLICATES = "near_duplicates.parquet"
_NEAR_SCHEMA = pa.schema(
    {"sample_key": pa.string(), "patient_key": pa.string(), "lookalike": pa.int64()}
)
_ARROW_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"


class ShardConfig(Config):
    """What the training shards are made of."""

    samples: str = Field(description="folder of the sample dataset that jobs/ingest.py wrote")
    shards: Path = Field(description="folder of the training shards, made or replaced")
    size: int | None = Field(
        None, ge=4, description="height and width, in pixels, at most the samples'"
    )
    bits: Bits | None = Field(None, description="bits per value, at most the samples'")
    channels: Literal["auto", "1", "3"] = Field(
        "auto", description="1, 3, or auto: 1 if every sample is grey"
    )
    classes: list[str] | None = Field(
        None,
        min_length=1,
        description="the labels to keep, in the order of their numbers; by default all, sorted. "
        "Where an image has several they are the findings that are learnt, and every image is kept",
    )
    seed: int = Field(0, description="seed of the split and of the shuffle")
    split: SplitConfig = Field(default_factory=SplitConfig)
    near_duplicates: int | None = Field(
        None,
        ge=0,
        le=15,
        description="keep patients with images that look alike in one split: the bits, of the 64 "
        "of a perceptual hash, that may differ; by default only equal pixels count. 4 is usual",
    )
    shard_bytes: int = Field(64 << 20, ge=1 << 10, description="most pixels in one file, in bytes")
    rows_per_group: int = Field(256, ge=1, description="rows in a Parquet row group")

    @field_validator("classes")
    @classmethod
    def _each_once(cls, classes: list[str] | None) -> list[str] | None:
        twice = [name for name, times in Counter(classes or ()).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice, and a class has one number.")
        return classes


def open_samples(config: ShardConfig) -> SamplesManifest:
    """Return what the sample dataset holds.

    Raises UsageError where it holds nothing, a library that is asked for is missing, or the folder
    of the shards is not ours or not apart from that of the samples.
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
    ownership.apart(
        {"the samples": storage.normalise(config.samples)}, {"the shards": config.shards}
    )
    ownership.check(config.shards, "shards")
    return manifest


def make_shards(
    spark: SparkSession, config: ShardConfig, manifest: SamplesManifest
) -> dict[str, Any]:
    """Write the training shards and return what they hold.

    The same samples, seed and settings give the same files, so the same digest. Raises UsageError
    where the samples cannot be brought to one format, or leave a split empty.
    """
    ownership.claim(config.shards, "shards")
    with locked(config.shards), task_errors():
        clean_shards(config.shards)
        try:
            return _Sharding(spark, config, manifest).run()
        finally:
            clean_shards(config.shards)


class _Sharding:
    """One run, step by step."""

    def __init__(self, spark: SparkSession, config: ShardConfig, manifest: SamplesManifest) -> None:
        self._spark, self._config, self._source = spark, config, manifest
        self._numbering = Findings() if manifest.multi_label else Classes()
        self._samples = SampleSet(config.samples)
        self._parts = {part.path: (part.bytes, part.sha256) for part in manifest.parts}
        self._generation = new_generation()

    def run(self) -> dict[str, Any]:
        live, alike = self._grouped(self._live())
        classes = self._classes(live)
        pixel_format = self._format(live)
        dealt = self._dealt(live, classes).persist()
        try:
            counts = self._counts(dealt, classes)
            leak_check = self._leak_check(dealt) | alike
            layout = Layout.of(counts, pixel_format, self._config.shard_bytes)
            written = self._write(dealt, layout, pixel_format)
        finally:
            dealt.unpersist()
        splits = {name: self._split(name, counts[name], layout, written) for name in SPLITS}
        self._commit(splits, classes, pixel_format, leak_check)
        return self._result(splits, classes, pixel_format, leak_check)

    # --- what there is ---

    def _live(self) -> DataFrame:
        rows = ledger.read(self._spark, self._samples, self._source.ledger)
        live = rows.where(F.col("outcome") == ledger.SAMPLE)
        if is_former(self._source):  # its sites are plain names until the next ingest
            live = live.withColumn("site", F.lit(None).cast("string"))
        if self._config.classes is not None:
            live = self._numbering.kept(live, self._config.classes)
        return live

    def _classes(self, live: DataFrame) -> list[str]:
        labels = [row["label"] for row in live.select("label").distinct().collect()]
        found = sorted(self._numbering.names(labels))
        missing = set(self._config.classes or []) - set(found)
        if missing:
            raise UsageError(f"No sample has the label {sorted(missing)[0]!r} of --classes.")
        if not found:
            raise UsageError(f"{self._config.samples} holds no samples to make shards of.")
        classes = self._config.classes or found
        self._numbering.check(classes)
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
                f"--size cannot be {height}; samples are made smaller here, never larger."
            )
        bits = config.bits or row["min_bits"]
        if bits > row["min_bits"]:
            raise UsageError(f"The samples have {row['min_bits']} bits; --bits cannot be {bits}.")
        channels = row["max_channels"] if config.channels == "auto" else int(config.channels)
        return PixelFormat(height, width, channels, bits)

    # --- what goes where ---

    def _grouped(self, live: DataFrame) -> tuple[DataFrame, dict[str, int]]:
        """Return the samples with the group of their patient, and what was found alike.

        Patients of one group go to one split. A patient is a group of its own, named by its key,
        unless an image looks like another patient's.
        """
        bits = self._config.near_duplicates
        if bits is None:
            (self._config.shards / NEAR_DUPLICATES).unlink(missing_ok=True)
            return live.withColumn("group", F.col("patient_key")), {}
        found = lookalikes(live, HashSamples(self._samples.url, self._parts), bits=bits)
        _write_table(found, self._config.shards / NEAR_DUPLICATES)
        tied = tied_patients(found)
        table = self._spark.createDataFrame(list(tied.items()), "patient_key string, tied string")
        joined = live.join(F.broadcast(table), "patient_key", "left")
        groups = joined.withColumn("group", F.coalesce("tied", "patient_key")).drop("tied")
        return groups, {"near_duplicates": len(found), "patients_kept_together": len(tied)}

    def _dealt(self, live: DataFrame, classes: list[str]) -> DataFrame:
        """Return every sample with its split and its place in the shuffled split."""
        own = [row["split"] for row in live.select("split").distinct().collect() if row["split"]]
        hints = live.groupBy("group").agg(F.collect_set("split").alias("hints"))
        deal = _Deal(self._config.split, self._config.seed, own)
        groups = map_batches(hints, deal, "group string, target string")
        # SHA-256, so that anybody can repeat the shuffle without Spark.
        order = F.sha2(F.concat(F.lit(f"{self._config.seed}\n"), F.col("sample_key")), 256)
        shuffled = Window.partitionBy("target").orderBy(order, "sample_key")
        return (
            live.join(groups, "group")
            .withColumn("number", self._numbering.number(classes))
            .withColumn("position", (F.row_number().over(shuffled) - 1).cast("bigint"))
            .select(
                "target", "position", "sample_key", "patient_key", "site", "number", "split",
                "pixel_key", "part", "row",
            )
        )  # fmt: skip

    def _counts(self, dealt: DataFrame, classes: list[str]) -> dict[str, Counts]:
        images: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        sites: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for row in dealt.groupBy("target", "number", "site").count().collect():
            images[row["target"]][row["number"]] += row["count"]
            if row["site"] is not None:
                sites[row["target"]][row["site"]] += row["count"]
        patients = {
            row["target"]: row["patients"]
            for row in dealt.groupBy("target")
            .agg(F.countDistinct("patient_key").alias("patients"))
            .collect()
        }
        counts = {
            split: Counts(
                sum(images[split].values()),
                self._numbering.by_class(images[split], len(classes)),
                patients.get(split, 0),
                dict(sorted(sites[split].items())),
            )
            for split in SPLITS
        }
        for split in ("train", "test"):
            if counts[split].rows == 0:
                raise UsageError(
                    f"The {split} split is empty: there are too few patients for these shares; "
                    "change split.val, split.test or seed."
                )
        return counts

    def _leak_check(self, dealt: DataFrame) -> dict[str, int]:
        leaks = {
            "patients_in_two_splits": _in_two(dealt, "patient_key"),
            "images_in_two_splits": _in_two(dealt, "pixel_key"),
        }
        if any(leaks.values()):
            raise RunError(f"The splits are not apart: {leaks}.")
        moved = dealt.where(F.col("split").isNotNull() & (F.col("split") != F.col("target")))
        # A patient whose images came with several hints is in the most held-out of them.
        overruled = moved.where(F.col("split") != "train").count()
        torn = dealt.where(F.col("split").isNotNull()).groupBy("patient_key")
        both = torn.agg(F.countDistinct("split").alias("hints")).where(F.col("hints") > 1).count()
        return leaks | {"hints_overruled": overruled, "patients_with_several_hints": both}

    # --- what is written ---

    def _write(
        self, dealt: DataFrame, layout: Layout, pixel_format: PixelFormat
    ) -> dict[int, Shard]:
        bucket = F.lit(None)
        for split in layout.splits:
            if split.rows:
                number = layout.number(split, F.col("position"))
                bucket = F.when(F.col("target") == split.name, F.floor(number)).otherwise(bucket)
        placed = dealt.withColumn("bucket", bucket.cast("int")).select(
            "bucket", "position", "sample_key", "patient_key", "site", "number", "part", "row"
        )
        parts = self._parts
        cores = self._spark.sparkContext.defaultParallelism
        read = ReadSamples(self._samples.url, parts, pixel_format)
        write = WriteShards(str(self._config.shards), self._generation, layout, pixel_format,
                       self._config.rows_per_group)  # fmt: skip
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
            raise RunError(f"The {name} shards do not hold the {counts.rows} rows they should.")
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
        leak_check: dict[str, int],
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
                multi_label=self._numbering.multi_label,
                height=pixel_format.height,
                width=pixel_format.width,
                channels=pixel_format.channels,
                bits=pixel_format.bits,
                seed=self._config.seed,
                splits=splits,
                leak_check=leak_check,
                source=source,
            ),
        )

    def _digest(self, splits: dict[str, Split]) -> str:
        return digest_of(splits, multi_label=self._numbering.multi_label)

    def _result(
        self,
        splits: dict[str, Split],
        classes: list[str],
        pixel_format: PixelFormat,
        leak_check: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "shards_folder": str(self._config.shards),
            "digest": self._digest(splits),
            "classes": classes,
            "multi_label": self._numbering.multi_label,
            "pixels": {**vars(pixel_format)},
            "splits": {
                name: split.model_dump(exclude={"shards"}) | {"shards": len(split.shards)}
                for name, split in splits.items()
            },
            "leak_check": leak_check,
        }


@dataclass(frozen=True)
class _Deal:
    """Gives groups of patients their split, in a task."""

    config: SplitConfig
    seed: int
    own: list[str]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            groups = batch.column("group").to_pylist()
            hints = batch.column("hints").to_pylist()
            targets = [
                patient_split(group, hint, self.config, seed=self.seed, own=self.own)
                for group, hint in zip(groups, hints, strict=True)
            ]
            yield pa.RecordBatch.from_pydict({"group": groups, "target": targets})


def _write_table(found: list[Lookalike], path: Path) -> None:
    table = pa.Table.from_pylist([row._asdict() for row in found], schema=_NEAR_SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    try:
        pq.write_table(table, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _in_two(dealt: DataFrame, column: str) -> int:
    targets = dealt.groupBy(column).agg(F.min("target").alias("low"), F.max("target").alias("high"))
    return targets.where(F.col("low") != F.col("high")).count()
