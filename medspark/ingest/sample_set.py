"""The folder of a sample dataset: parts with pixels, a ledger, and a manifest that commits them.

    manifest.json                      what the dataset is; replaced last, all at once
    data/<generation>/*.parquet        samples with their pixels, only ever added to
    ledger/<generation>/*.parquet      what became of every file; says which rows of data count
    quarantine/<generation>/*.parquet  why files could not be used, and not which
    staging/                           of an ingest that runs, or was killed

Whatever the manifest does not name does not exist for readers. So an ingest that is killed at any
moment leaves the old dataset, and the next job clears what it left.

No path of the archive is anywhere in it, in clear: staged ones are sealed with the key of the
pseudonyms, and those of files that could not be used are in medspark.ingest.quarantine's list.
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

from medspark import ownership
from medspark.errors import UsageError
from medspark.ingest import ledger
from medspark.ingest.parts import Part
from medspark.lock import locked
from medspark.spark import storage

_LOGGER = logging.getLogger(__name__)

# Version 2 added multi_label; what version 1 holds has one label each. Version 3 has keys in place
# of digests, and no paths: the next ingest makes it of the others (medspark.ingest.migrate).
SCHEMA_VERSION = 3
_READ = (1, 2, 3)
MANIFEST = "manifest.json"
# Until version 3 the ledger's digests were plain.
_FORMER = {"content_key": "sha256", "pixel_key": "pixel_sha256"}
_LEDGER = from_arrow_schema(
    pa.schema([*ledger.SCHEMA, *[(name, pa.string()) for name in _FORMER.values()]])
)
# What ingests name: nothing else below the folder is ever removed.
GENERATION, _FILE = r"\d{8}T\d{6}-[0-9a-f]{6}", r"[0-9a-f]{32}\.parquet"
_SPARKS = r"\.?(part-.*|_(SUCCESS|(started|committed)_\d+)(\.crc)?)"
STAGED = tuple(
    f"staging/{name}" for name in (r"labels\.parquet", f"[a-z]+/{_SPARKS}", "[a-z]+/_temporary/")
)


def new_generation() -> str:
    """Return the name of a generation that is about to be written: when, and by luck."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"


class SamplesManifest(BaseModel):
    """What a sample dataset holds and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    generation: str
    previous: str | None
    # Independent of file names and of the order of rows: equal samples, equal digest.
    digest: str
    counts: dict[str, int]
    rendering: dict[str, Any]
    # Whether a sample's label is any number of findings, as medspark.ingest.labels joins them.
    multi_label: bool = False
    # Proves that the next ingest uses the same key, and says nothing about it.
    key_check: str
    parts: tuple[Part, ...]
    ledger: tuple[str, ...]
    quarantine: tuple[str, ...]
    # Rows of the ledger that medspark.ingest.sealing has to open first.
    sealed: int = 0


class SampleSet:
    """The folder of a sample dataset, local or on any file system that fsspec and Spark share."""

    def __init__(self, url: str) -> None:
        self.url = storage.normalise(url)

    def path(self, *names: str) -> str:
        """Return the path of a file or folder of the dataset."""
        return storage.join(self.url, "/".join(names))

    def manifest(self) -> SamplesManifest | None:
        """Return what the dataset holds, or None where no ingest has finished yet."""
        path = self.path(MANIFEST)
        text = storage.read_text(path)
        if text is None:
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

    def read_ledger(self, spark: SparkSession, files: Sequence[str]) -> DataFrame:
        """Return the ledger that lies in ``files`` of the dataset, of which there may be none.

        Digests of earlier versions take the places of keys: they tell images apart as well, and
        medspark.ingest.migrate makes keys of them.
        """
        if not files:
            return spark.createDataFrame(ledger.SCHEMA.empty_table())
        paths = [storage.for_spark(self.path(path)) for path in files]
        rows = spark.read.schema(_LEDGER).parquet(*paths)
        for name, former in _FORMER.items():
            rows = rows.withColumn(name, F.coalesce(name, former))
        return rows.select(ledger.SCHEMA.names)

    def commit(self, manifest: SamplesManifest) -> None:
        """Make ``manifest`` the content of the dataset, all at once."""
        storage.write_text(self.path(MANIFEST), manifest.model_dump_json(indent=1))

    def clean(self) -> None:
        """Remove what no manifest names: the remains of ingests that did not finish.

        The generation before the current one is left for readers that are still at it.
        """
        manifest = self.manifest()
        kept = {manifest.generation, manifest.previous} if manifest else set()
        self.clean_staging()
        for kind in ("ledger", "quarantine"):
            for generation in self._generations(kind) - kept:
                ownership.remove(self.url, [f"{kind}/{generation}/{_FILE}"])
        for generation in self._generations("data"):
            self._clean_parts(generation, manifest)

    def clean_staging(self) -> None:
        """Remove what an ingest keeps while it runs."""
        ownership.remove(self.url, STAGED)

    def clean_after_kill(self) -> None:
        """Remove what a killed ingest left, if one did; nothing where one is at work.

        For jobs that only read the dataset, and may not be allowed more.
        """
        if not storage.is_folder(self.path("staging")):
            return
        try:
            with locked(self.url):
                self.clean()
        except (UsageError, OSError) as error:
            _LOGGER.warning("What an ingest left in %s stays there: %s", self.url, error)

    def clean_newest(self) -> None:
        """Remove parts that killed tasks have left in the generation that was just committed.

        The attempt that took a task's place wrote parts of its own, which the manifest names.
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
