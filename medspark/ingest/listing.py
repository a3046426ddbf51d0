"""List the files of an archive with label, patient, split and site, before any file is opened.

The task that lists a path seals it, so no shuffle and no file in ``staging`` holds a plain path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import storage
from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.ingest import ledger, npz
from medspark.ingest.archive import Archive
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.discover import discover, from_inventory
from medspark.ingest.label_table import SPARK_SCHEMA as LABEL_SCHEMA
from medspark.ingest.label_table import Match, match_key
from medspark.ingest.labels import from_folders
from medspark.spark.tables import read_files
from medspark.spark.task import from_arrow, map_batches

_TEXT, _NUMBER = pa.string(), pa.int64()
_KEYED = pa.schema(
    [
        ("sealed_path", _TEXT),
        ("file_key", _TEXT),
        ("size", _NUMBER),
        ("modified", _NUMBER),
        ("match", _TEXT),
    ]
)
ANNOTATED = pa.schema(
    [
        ("sealed_path", _TEXT),
        ("size", _NUMBER),
        ("label", _TEXT),
        ("patient_key", _TEXT),
        ("split", _TEXT),
        ("site", _TEXT),
        ("conflict", pa.bool_()),
        ("file_key", _TEXT),
        ("fingerprint", _TEXT),
    ]
)


def annotated(spark: SparkSession, archive: Archive) -> DataFrame:
    """Return the files of ``archive`` with label, patient, split, site, and their keys."""
    config = archive.config
    listed = listing(
        spark,
        archive.source,
        inventory=config.inventory,
        limits=config.limits,
        exclude=_side_files(archive),
    )
    if archive.table is not None:
        listed = _with_table(spark, archive, listed)
    annotate = Annotate(
        archive.source, archive.pseudonyms, config.privacy, by_folder=archive.by_folder
    )
    return map_batches(listed, annotate, from_arrow_schema(ANNOTATED))


def listing(
    spark: SparkSession,
    source: str,
    *,
    inventory: str | None,
    limits: ArchiveLimits,
    exclude: frozenset[str] = frozenset(),
) -> DataFrame:
    """Return the files of a source with path, size and modified, and what an .npz knows of them."""
    if npz.is_npz(source):
        return from_arrow(spark, npz.list_images(source, limits))
    if inventory:
        return from_inventory(spark, inventory, source)
    return discover(spark, source, exclude=exclude, follow_links=limits.follow_links)


def check_folders(archive: Archive, classes: int) -> None:
    """Raise UsageError if there are more class folders than ``max_classes``."""
    most = archive.config.max_classes
    if classes > most:
        raise UsageError(
            f"{archive.source} has {classes} class folders, more than max_classes ({most}): if "
            "they are patients, give a label table with --labels; if they are diagnoses, raise "
            "--max_classes."
        )


def _with_table(spark: SparkSession, archive: Archive, listed: DataFrame) -> DataFrame:
    table, path = archive.table, archive.samples.path("staging", "labels.parquet")
    assert table is not None
    storage.make_folder(archive.samples.path("staging"))
    table.write(path, archive.pseudonyms)
    rows = read_files(spark, [path], LABEL_SCHEMA)
    labels = (
        rows.where(F.col("match").isNotNull())
        .groupBy("match")
        .agg(
            F.min("label").alias("label"),
            F.min("patient_key").alias("patient_key"),
            # A file that is listed under two splits goes to the more held-out one.
            F.min_by("split", ledger.hint_rank()).alias("split"),
            F.min("site").alias("site"),
            (F.min("label") != F.max("label")).alias("conflict"),
        )
    )
    keyed = Keyed(archive.source, archive.pseudonyms, archive.config.label_table.match)
    files = map_batches(listed, keyed, from_arrow_schema(_KEYED))
    return files.join(labels, "match", "left").drop("match")


def _side_files(archive: Archive) -> frozenset[str]:
    """Return the files below the source that are no images: the label table."""
    labels = archive.config.labels
    if labels is None or archive.table is None:
        return frozenset()
    prefix = archive.source + "/"
    table = storage.normalise(labels)
    return frozenset([table.removeprefix(prefix)]) if table.startswith(prefix) else frozenset()


@dataclass(frozen=True)
class Keyed:
    """Seals the paths of files, in a task, and adds their file keys and join keys."""

    source: str
    pseudonyms: Pseudonyms
    match: Match | None = None

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [self.row(row) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=_KEYED)

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of the listing with keys instead of the path."""
        path, pseudonyms = row["path"], self.pseudonyms
        return {
            "sealed_path": pseudonyms.seal(path),
            "file_key": self.file_key(path),
            "size": row["size"],
            "modified": row["modified"],
            "match": pseudonyms.seal(match_key(path, self.match)) if self.match else None,
        }

    def file_key(self, path: str) -> str:
        """Return the ledger's key of the file at ``path``, which is relative to the source."""
        return self.pseudonyms.name("file", f"{self.source}/{path}")


class Annotate:
    """Adds each file's fingerprint, its pseudonymised site and, if ``by_folder``, its label."""

    def __init__(
        self, source: str, pseudonyms: Pseudonyms, privacy: Privacy, *, by_folder: bool
    ) -> None:
        self._keyed = Keyed(source, pseudonyms)
        self._pseudonyms, self._privacy, self._by_folder = pseudonyms, privacy, by_folder

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Take rows of a listing, or of Keyed with the label table's columns."""
        for batch in batches:
            columns = self._annotated(batch.to_pydict(), batch.num_rows)
            arrays = [pa.array(columns[field.name], field.type) for field in ANNOTATED]
            yield pa.RecordBatch.from_arrays(arrays, schema=ANNOTATED)

    def _annotated(self, known: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
        # By column: a dictionary for each row takes a third of the time.
        pseudonyms, nothing = self._pseudonyms, [None] * count
        columns = {name: known.get(name, nothing) for name in ANNOTATED.names}
        if "file_key" not in known:
            columns["sealed_path"] = [pseudonyms.seal(path) for path in known["path"]]
            columns["file_key"] = [self._keyed.file_key(path) for path in known["path"]]
        if self._by_folder:
            found = [from_folders(path) for path in known["path"]]
            columns["label"] = [label for label, _ in found]
            columns["split"] = [split for _, split in found]
        sites = [pseudonyms.unseal(site) if site else None for site in columns["site"]]
        columns["conflict"] = [bool(conflict) for conflict in columns["conflict"]]
        # Hash the site's plain name: ledger.compare checks its stored form separately.
        states = zip(
            columns["size"], known["modified"], columns["label"], columns["patient_key"],
            columns["split"], sites, columns["conflict"], strict=True,
        )  # fmt: skip
        columns["fingerprint"] = [
            pseudonyms.name("fingerprint", repr(list(state))) for state in states
        ]
        columns["site"] = [self._privacy.site(site, pseudonyms) if site else None for site in sites]
        return columns
