"""The folder of a sample dataset: parts with pixels, a ledger, and a manifest that commits them.

    manifest.json                      names all other files; replaced last and atomically
    data/<generation>/*.parquet        samples with their pixels; files are added, never changed
    ledger/<generation>/*.parquet      outcome of every file; decides which rows of data count
    superseded/<generation>/*.parquet  rows of the ledger that later ones replace
    quarantine/<generation>/*.parquet  reasons why files could not be used, without the files
    staging/                           temporary files of an ingest that runs or was killed

Readers ignore files that the manifest does not name. So an ingest that is killed at any moment
leaves the old dataset, and the next job removes the leftovers.

The folder holds no plain path of the archive. Staged paths are sealed with the key of the
pseudonyms; paths of quarantined files are in the list of medspark.ingest.quarantine.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import ownership, storage
from medspark.errors import MedsparkError, UsageError
from medspark.ingest import ledger
from medspark.ingest.parts import Part
from medspark.lock import locked
from medspark.spark.tables import read_files
from medspark.spark.task import from_arrow

_LOGGER = logging.getLogger(__name__)

# Version 2 added multi_label; samples of version 1 have one label each. Version 3 has keys instead
# of digests, and no paths; the next ingest migrates earlier versions (medspark.ingest.migrate).
# Version 4 may replace single rows of the ledger (medspark.ingest.increment).
SCHEMA_VERSION = 4
KEYED_VERSION = 3
_READ = (1, 2, 3, 4)
MANIFEST = "manifest.json"
# Before version 3 the ledger held unkeyed digests.
_FORMER = {"content_key": "sha256", "pixel_key": "pixel_sha256"}
_LEDGER = from_arrow_schema(
    pa.schema([*ledger.STORED, *[(name, pa.string()) for name in _FORMER.values()]])
)
_IDENTITY = from_arrow_schema(
    pa.schema([field for field in ledger.STORED if field.name in ledger.IDENTITY])
)
# The kinds of files beside those with pixels.
_KINDS = ("ledger", "superseded", "quarantine")
# Names that ingests generate: nothing else below the folder is ever removed.
GENERATION, _FILE = r"\d{8}T\d{6}-[0-9a-f]{6}", r"[0-9a-f]{32}\.parquet"
SPARK_FILES = r"\.?(part-.*|_(SUCCESS|(started|committed)_\d+)(\.crc)?)"
STAGED = tuple(
    f"staging/{name}"
    for name in (r"labels\.parquet", f"[a-z]+/{SPARK_FILES}", "[a-z]+/_temporary/")
)


def new_generation() -> str:
    """Return the name of a new generation: the local time and six random hexadecimal digits."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"


class Settled(BaseModel):
    """The sums of a ledger (medspark.ingest.tally) as the last ingest of ``source_key`` left it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_key: str
    sums: dict[str, dict[str, int]]
    rows: int  # in the files of the ledger
    superseded: int  # of these


class SamplesManifest(BaseModel):
    """The files of a sample dataset, and how they were made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    generation: str
    previous: str | None
    # Independent of file names and of the order of rows: equal samples have equal digests.
    digest: str
    counts: dict[str, int]
    rendering: dict[str, Any]
    # Whether a sample has any number of findings, joined by medspark.ingest.labels.
    multi_label: bool = False
    # Lets the next ingest check that it uses the same key, without revealing the key.
    key_check: str
    parts: tuple[Part, ...]
    ledger: tuple[str, ...]
    quarantine: tuple[str, ...]
    # Number of ledger rows that medspark.ingest.sealing has sealed.
    sealed: int = 0
    # Files of ledger rows that later rows replace.
    superseded: tuple[str, ...] = ()
    # Files that the previous manifest names and this one does not: readers may still use them.
    retired: tuple[str, ...] = ()
    # What the ledger adds up to, for the next ingest of the same source; None if it has to add up.
    settled: Settled | None = None

    def named(self) -> frozenset[str]:
        """Return the paths of all files of the dataset but those with pixels."""
        return frozenset((*self.ledger, *self.superseded, *self.quarantine))


class SampleSet:
    """The folder of a sample dataset, local or on any file system that fsspec and Spark share."""

    def __init__(self, url: str) -> None:
        self.url = storage.normalise(url)
        self._version: str | None = None  # of the manifest that was read last

    def path(self, *names: str) -> str:
        """Return the path of a file or folder of the dataset."""
        return storage.join(self.url, "/".join(names))

    def manifest(self) -> SamplesManifest | None:
        """Return the manifest, or None if no ingest has finished yet.

        Raises UsageError for a file of another kind or schema version.
        """
        path = self.path(MANIFEST)
        try:
            text, self._version = storage.read_version(path)
        except FileNotFoundError:
            self._version = None
            return None
        try:
            record = json.loads(text)
            version = record.get("schema_version")
            if version not in _READ:
                raise UsageError(
                    f"{path} has schema version {version}; this medspark reads {SCHEMA_VERSION}."
                )
            return SamplesManifest.model_validate(record)
        except (ValueError, AttributeError, ValidationError) as error:
            raise UsageError(f"{path} is not a manifest of samples.") from error

    def read_ledger(
        self, spark: SparkSession, files: Sequence[str], superseded: Sequence[str] = ()
    ) -> DataFrame:
        """Return the ledger stored in ``files`` of the dataset; without files it is empty.

        Rows that the files ``superseded`` name are left out.
        Digests of earlier versions are returned as keys: they identify images too, and
        medspark.ingest.migrate turns them into keys.
        """
        if not files:
            return from_arrow(spark, ledger.STORED.empty_table())
        rows = read_files(spark, [self.path(path) for path in files], _LEDGER)
        for name, former in _FORMER.items():
            rows = rows.withColumn(name, F.coalesce(name, former))
        return self.standing(spark, rows.select(ledger.STORED.names), superseded)

    def standing(
        self, spark: SparkSession, rows: DataFrame, superseded: Sequence[str]
    ) -> DataFrame:
        """Return ``rows`` of the ledger without those that the files ``superseded`` name."""
        if not superseded:
            return rows
        replaced = read_files(spark, [self.path(path) for path in superseded], _IDENTITY)
        same = [rows[name].eqNullSafe(replaced[name]) for name in ledger.IDENTITY]
        return rows.join(replaced, same, "left_anti")

    def commit(self, manifest: SamplesManifest) -> None:
        """Make ``manifest`` the content of the dataset, atomically.

        It replaces the manifest that this object read last. Raises RunError if that is not the
        dataset's any more.
        """
        text = manifest.model_dump_json(indent=1)
        self._version = storage.commit(self.path(MANIFEST), text, self._version)

    def clean(self) -> None:
        """Remove files that no manifest names: leftovers of unfinished ingests.

        The previous generation stays, for readers that still use it.
        """
        manifest = self.manifest()
        kept = {manifest.generation, manifest.previous} if manifest else set()
        named = {*manifest.named(), *manifest.retired} if manifest else set()
        self.clean_staging()
        for kind in _KINDS:
            for generation in self._generations(kind) - kept:
                ownership.remove(self.url, [f"{kind}/{generation}/{_FILE}"], keep=named)
        for generation in self._generations("data"):
            self._clean_parts(generation, manifest)

    def clean_staging(self) -> None:
        """Remove the temporary files of an ingest."""
        ownership.remove(self.url, STAGED)

    def clean_after_kill(self) -> None:
        """Remove the leftovers of a killed ingest; do nothing while an ingest runs.

        For jobs that read the dataset and may have no write permission: failures are logged.
        """
        if not storage.is_folder(self.path("staging")):
            return
        try:
            with locked(self.url):
                self.clean()
        except (MedsparkError, OSError) as error:
            _LOGGER.warning("Leftovers of an ingest stay in %s: %s", self.url, error)

    def clean_newest(self) -> None:
        """Remove the parts of killed tasks from the generation that was just committed.

        The manifest names the parts that the successful attempts wrote.
        """
        manifest = self.manifest()
        if manifest is not None:
            self._clean_parts(manifest.generation, manifest)

    def _clean_parts(self, generation: str, manifest: SamplesManifest | None) -> None:
        kept = {part.path for part in manifest.parts} if manifest else set()
        ownership.remove(self.url, [f"data/{generation}/{_FILE}"], keep=kept)

    def _generations(self, kind: str) -> set[str]:
        folder = self.path(kind)
        if not storage.is_folder(folder):
            return set()
        names = (entry.path.rpartition("/")[2] for entry in storage.children(folder))
        return {name for name in names if re.fullmatch(GENERATION, name)}
