"""Migrate a dataset of schema version 1 or 2 to a later one, without decoding any image.

Versions 1 and 2 held paths in the quarantine, unkeyed digests, plain site names, and exact pixel
spacings. The migration writes all files again in a new generation, and commits them together with
the ingest's other changes. Then the old files are removed. No sample is added or lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from medspark import storage
from medspark.images.deidentify import Privacy, Pseudonyms, coarse_spacing
from medspark.ingest.parts import SAMPLE_SCHEMA, Part, rewrite
from medspark.ingest.sample_set import KEYED_VERSION, SampleSet, SamplesManifest
from medspark.spark.cluster import default_parallelism
from medspark.spark.task import map_batches

PARTS = "path string, rows bigint, bytes bigint, sha256 string"
_SPACINGS = ("row_spacing_mm", "column_spacing_mm")


@dataclass(frozen=True)
class Migration:
    """Converts ledger rows and parts of earlier versions, as part of ``generation``."""

    generation: str
    pseudonyms: Pseudonyms
    privacy: Privacy

    def ledger(self, rows: DataFrame) -> DataFrame:
        """Return the ``rows`` of an earlier ledger with keyed digests and pseudonymised sites."""
        return map_batches(rows, self._ledger_batches, rows.schema)

    def parts(self, spark: SparkSession, samples: SampleSet, parts: Sequence[Part]) -> DataFrame:
        """Rewrite ``parts`` in tasks and return the new parts as rows of PARTS."""
        rows = [(part.path, part.rows, part.bytes, part.sha256) for part in parts]
        tasks = max(1, min(len(rows), 8 * default_parallelism(spark)))
        table = spark.createDataFrame(rows, PARTS).repartition(tasks)
        return map_batches(table, _RenewParts(self, samples.url), PARTS)

    def part(self, path: str) -> str:
        """Return the new path of an earlier part."""
        return f"data/{self.generation}/{path.rpartition('/')[2]}"

    def site(self, name: str | None) -> str | None:
        """Return the stored form of a site's name, which the privacy settings decide."""
        return self.privacy.site(name, self.pseudonyms) if name else None

    def _ledger_batches(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [self._ledger_row(row) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=batch.schema)

    def _ledger_row(self, row: dict[str, Any]) -> dict[str, Any]:
        content, pixels, part = row["content_key"], row["pixel_key"], row["part"]
        return row | {
            "content_key": self.pseudonyms.content(content) if content else None,
            "pixel_key": self.pseudonyms.pixels(pixels) if pixels else None,
            "site": self.site(row["site"]),
            "part": self.part(part) if part else None,
        }


@dataclass(frozen=True)
class _RenewParts:
    migration: Migration
    samples: str

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                old = Part.model_validate(row)
                new = rewrite(self.samples, old, self.migration.part(old.path), self._renewed)
                yield pa.RecordBatch.from_pylist([new.model_dump()])

    def _renewed(self, table: pa.Table) -> pa.Table:
        columns = {name: table[name] for name in SAMPLE_SCHEMA.names}
        sites = [self.migration.site(site) for site in table["site"].to_pylist()]
        columns["site"] = pa.array(sites, pa.string())
        for name in _SPACINGS:
            spacings = table[name].to_pylist()
            rounded = [None if spacing is None else coarse_spacing(spacing) for spacing in spacings]
            columns[name] = pa.array(rounded, pa.float64())
        return pa.table(columns, schema=SAMPLE_SCHEMA)


def is_former(manifest: SamplesManifest | None) -> bool:
    """Return whether the dataset has an earlier schema version."""
    return manifest is not None and manifest.schema_version < KEYED_VERSION


def former_paths(samples: SampleSet, manifest: SamplesManifest | None) -> Iterator[tuple[str, str]]:
    """Yield (file_key, path) of the quarantine of an earlier version; else nothing."""
    for name in manifest.quarantine if manifest and is_former(manifest) else ():
        system, path = storage.filesystem(samples.path(name))
        with system.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=["file_key", "path"]):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
